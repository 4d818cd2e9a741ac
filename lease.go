// lease.go: claims, grants and leases (design.md §8): who may run what, until
// when. It is a part of the core (monitor.go): pure.

package main

import (
	"time"
)

// leaseClock is a reading of the two clocks of this boot that leases are
// measured by. They are never compared with those of another machine.
type leaseClock struct {
	raw  time.Duration // CLOCK_MONOTONIC_RAW
	boot time.Duration // CLOCK_BOOTTIME
}

func (t leaseClock) add(d time.Duration) leaseClock { return leaseClock{t.raw + d, t.boot + d} }

// reached tells whether the moment has come by one of the clocks: so holders
// and guards measure.
func (t leaseClock) reached(moment leaseClock) bool {
	return t.raw >= moment.raw || t.boot >= moment.boot
}

// surely tells whether the moment has come by both: so voters measure.
func (t leaseClock) surely(moment leaseClock) bool {
	return t.raw >= moment.raw && t.boot >= moment.boot
}

// moment is the time of a step. wall is for people and for delays that matter
// to this node alone; clock is for leases.
type moment struct {
	wall  time.Time
	clock leaseClock
}

// clusterSpec is what the core knows of the cluster's configuration.
type clusterSpec struct {
	members   []string // in the order of the list
	witnesses []string
	list      uint32 // the version of the list
	quorum    bool
	timeout   time.Duration // the largest hb#N.timeout
	grace     time.Duration // cluster.quorum_grace
	rejoin    time.Duration // node.rejoin_grace_period
	longest   time.Duration // the longest term that any node may have stated
	beating   bool          // there is a heartbeat
}

// birth is what a core begins with.
type birth struct {
	node    string
	epoch   uint64 // stored and synced already
	salt    uint64 // random
	seed    uint64 // random: of waits
	frozen  bool
	now     moment
	cluster clusterSpec
	votes   *votes // nil: there never were any
	// lost: there were votes, and they cannot be read.
	lost bool
	// held are the instances that the guard has to stop, and when, in this boot.
	held map[string]leaseClock
}

// votes is the voter's journal.
type votes struct {
	Grants map[string]grant `json:"grants"` // by service
	// Mute is for how long no vote may be given, counted from the start.
	Mute time.Duration `json:"mute,omitempty"`
}

// grant is a voter's promise to one claim.
type grant struct {
	Node  string        `json:"node"`
	Epoch uint64        `json:"epoch"`
	Claim uint32        `json:"claim"`
	Term  time.Duration `json:"term"` // as it was stated
}

// peerData is what the core knows of a peer's data.
type peerData struct {
	frozen    bool
	instances map[string]instanceBrief
}

// instanceBrief is what a node says of its instance.
type instanceBrief struct {
	avail  status
	state  monitorState
	frozen bool
}

type (
	// clusterEvent: the configuration of the cluster is another.
	clusterEvent struct{ spec clusterSpec }
	// beatDue: it is time for the beats of one heartbeat.
	beatDue struct{ heartbeat string }
	// beatEvent: a beat came. It opened, so a member that knows the secret sent
	// it, at some time.
	beatEvent struct {
		from string
		beat beat
	}
	// dataDue: this node's data changed: peers shall hear of it at once.
	dataDue struct{}
	// peerEvent: the data of a peer, as it is known now.
	peerEvent struct {
		node string
		data peerData
	}
	// votesKept: the journal was written up to version, or not.
	votesKept struct {
		version uint64
		err     error
	}
	// guardEvent: the guard lives, or not.
	guardEvent struct{ alive bool }
)

type (
	// beatEffect: send a beat to a peer; heartbeat "" means by all of them.
	// The shell fills in its data.
	beatEffect struct {
		to, heartbeat string
		beat          beat
	}
	// acceptEffect: the beat of this step counts: its link is good, and it is
	// the newest. Its data may be taken.
	acceptEffect struct{ from string }
	// votesEffect: keep the journal, then tell votesKept.
	votesEffect struct {
		version uint64
		votes   votes
	}
	// guardEffect: what the guard has to stop at the deadline; own are the
	// instances that have another one. It is in force before what follows it in
	// the same step is done.
	guardEffect struct {
		held     []string // sorted
		deadline leaseClock
		own      map[string]leaseClock
	}
	// anewEffect: this daemon must begin anew, with an epoch above this one,
	// and give no votes for a term.
	anewEffect struct {
		epoch uint64
		why   string
	}
)
