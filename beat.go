// beat.go: what a beat says (design.md §4). Its form on the wire and its
// sealing are in heartbeat.go and crypto.go; what it means, in link.go and
// lease.go (claims, votes) and in data.go (versions, changes).

package main

import "time"

// beat is one heartbeat message. Each goes to one peer.
type beat struct {
	salt uint64 // of the sender's present start: the key salt, in clear
	seq  uint64 // from 1, for each peer and start

	epoch uint64        // of the sender; higher at each start
	list  uint32        // the version of the sender's list of members; votes count between equal ones
	term  time.Duration // the stated term, whole ms
	heard uint64        // bit i: the sender has a good link to member i of the list, or is it

	// What the sender has received from this peer: the last beat, and the first
	// 4 bytes of the salt it came under.
	ackSeq  uint64
	ackSalt uint32

	// Claims of the sender. The record holds what changed after number base,
	// which the peer holds; nil where it holds all.
	claims  uint32 // the number of their present content
	changes *claimChanges

	// The vote of the sender on claims of this peer: those numbered up to
	// granted are granted, but for those refused. 0: none.
	granted uint32
	refused []uint32

	data beatData
}

// claimChanges turns the content of number base, or a later one, into the
// present one.
type claimChanges struct {
	base    uint32
	entries []claimEntry // sorted by service
}

// claimEntry is a claim; number 0: given back.
type claimEntry struct {
	service string
	number  uint32
}

// beatData is the part of a beat that carries data. The core hands it through.
type beatData struct {
	version uint64        // of the sender's own data
	digest  uint64        // of all versions it holds
	held    []dataVersion // these versions, where digests differ
	changes *dataChanges  // of the sender's data, where they are small
	token   []byte        // of the link: 16 random bytes
	keys    [][4]byte     // ids of the keys that the sender holds
}

// dataVersion is what is held of a member's data.
type dataVersion struct {
	node  string
	epoch uint64
	seq   uint64
}

// dataChanges turns version base of a node's data, or a later one, into
// version seq.
type dataChanges struct {
	base, seq uint64
	entries   []dataEntry // sorted by key
}

// dataEntry is one value, as JSON; nil: gone.
type dataEntry struct {
	key   string
	value []byte
}
