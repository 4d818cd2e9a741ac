package main

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkCoreBeat is one beat that changes nothing, received by a node that
// holds the given number of services.
func BenchmarkCoreBeat(b *testing.B) {
	for _, services := range []int{0, 100, 1000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			s := &story{names: []string{"n1", "n2", "n3"}, nodes: map[string]*storyNode{}, cut: map[string]bool{}, files: map[string]string{}}
			for i := range services {
				s.files[fmt.Sprintf("web%d", i)] = "[DEFAULT]\nnodes = n1 n2 n3\norchestrate = ha\n[app#1]\nexec = /a\n"
			}
			for _, name := range s.names {
				s.nodes[name] = &storyNode{name: name, epoch: 1, votes: &votes{}, running: map[string]bool{}}
			}
			for _, name := range s.names {
				s.start(s.nodes[name])
			}
			s.until(10 * time.Second)
			n1, n2 := s.nodes["n1"], s.nodes["n2"]
			var last beat
			for _, f := range n2.core.step(s.moment(), beatDue{"hb#1"}) {
				if f, ok := f.(beatEffect); ok && f.to == "n1" {
					last = f.beat
				}
			}
			if services > 0 && len(n1.held.held) != services {
				b.Fatalf("n1 holds %d", len(n1.held.held))
			}
			b.ReportAllocs()
			for b.Loop() {
				last.seq++
				n1.core.step(s.moment(), beatEvent{"n2", last})
			}
		})
	}
}
