// votes.go: what the core of a cluster's node needs of the disk and of the
// configuration: the epoch of each start and the voter's journal, both synced
// before anything is said that relies on them, and the members. The core
// (claim.go) says what is in the journal.

package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func (p paths) votes() string { return filepath.Join(p.lib, "votes") }
func (p paths) epoch() string { return filepath.Join(p.lib, "epoch") }

// votesSizeLimit bounds the journal, in bytes.
const votesSizeLimit = 16 << 20

// nextEpoch stores the epoch of a new start, which is above the stored one,
// above `above`, and where the clock is right, above those of a lost disk.
func nextEpoch(p paths, wall time.Time, above uint64) (uint64, error) {
	stored, err := readEpoch(p)
	if err != nil {
		return 0, err
	}
	epoch := max(stored+1, above+1, uint64(wall.UnixMilli()))
	if err := writeFile(p.epoch(), []byte(strconv.FormatUint(epoch, 10)+"\n"), 0o600); err != nil {
		return 0, fmt.Errorf("cannot begin to speak to the cluster: %w", err)
	}
	return epoch, nil
}

// readEpoch returns the stored epoch; 0 where there never was one, or what is
// there is none, since the wall clock goes beyond it then.
func readEpoch(p paths) (uint64, error) {
	text, _, err := readRegular(p.epoch(), 64)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot begin to speak to the cluster: %w", err)
	}
	epoch, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, nil
	}
	return epoch, nil
}

// readVotes reads the voter's journal. On a node that never had an epoch there
// is none, and an empty one is begun; anywhere else one that is missing is one
// that was lost, and err says so.
func readVotes(p paths) (*votes, error) {
	data, _, err := readRegular(p.votes(), votesSizeLimit)
	if errors.Is(err, os.ErrNotExist) {
		if _, missing := os.Stat(p.epoch()); errors.Is(missing, os.ErrNotExist) {
			return &votes{}, writeVotes(p, votes{})
		}
	}
	v := &votes{}
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		return nil, fmt.Errorf("the journal of votes is lost: %w", err)
	}
	return v, nil
}

func writeVotes(p paths, v votes) error {
	data, err := json.Marshal(v)
	if err == nil {
		err = writeFile(p.votes(), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("votes cannot be kept: %w", err)
	}
	return nil
}

// randomNumber is for salts and seeds.
func randomNumber() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return binary.BigEndian.Uint64(b[:])
}

// cluster is what the core needs to know. The list is sorted, so that its order
// in the files does not matter, and its version stands for all that must be the
// same for votes to count.
func (c *config) cluster() clusterSpec {
	spec := clusterSpec{
		members: slices.Sorted(slices.Values(c.members())), witnesses: c.list("cluster.witnesses"),
		grace: c.duration("cluster.quorum_grace"), rejoin: c.duration("node.rejoin_grace_period"),
	}
	for _, id := range c.heartbeats() {
		spec.beating = true
		spec.timeout = max(spec.timeout, c.forNode(id, "timeout", c.node).(time.Duration))
	}
	if !spec.beating {
		spec.timeout = nodeKeys.find("hb#1", "timeout").parsed("3s").(time.Duration)
	}
	spec.longest = termOf(max(spec.timeout, c.duration("node.maintenance_grace_period")), spec.grace)
	switch c.text("cluster.quorum") {
	case "auto":
		spec.quorum = len(spec.members) >= 3
	case "true":
		spec.quorum = true
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %t", spec.members, slices.Sorted(slices.Values(spec.witnesses)), spec.quorum))
	spec.list = binary.BigEndian.Uint32(sum[:])
	return spec
}
