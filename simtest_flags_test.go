package main

import "flag"

// The flags of both simulations: TestSim's, of the core alone, and
// TestCluster's, of whole daemons in virtual time.
var (
	simSeed  = flag.Int64("seed", -1, "simulations: run this seed alone, and show its trace with -v")
	simFirst = flag.Uint64("first", 1, "simulations: the first seed")
	simSeeds = flag.Uint64("seeds", 40, "simulations: how many seeds; TestClusterFaults: 8 unless given")
	simHours = flag.Float64("hours", 0.5, "simulations: virtual hours of each seed; TestClusterFaults: 3 minutes unless given")
)

// flagGiven tells whether a flag was given.
func flagGiven(name string) (given bool) {
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	return given
}
