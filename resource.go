// resource.go: the drivers of resources. A driver starts, stops and checks
// one kind of resource, by commands that it runs through its instance, which
// bounds them, logs what they print, and remembers them over a crash
// (instance.go). It decides nothing: monitor.go does.

package main

import (
	"context"
)

// driver is one kind of resource. Its methods are called for one resource one
// at a time.
type driver interface {
	// start returns nil when r is up; else why it is not, and r may be up in
	// part, so that stop is called.
	start(ctx context.Context, in *instance, r *resource) error
	// stop returns nil when r is down. It is called whatever state r is in.
	stop(ctx context.Context, in *instance, r *resource) error
	// check tells the state of r, and in a few words why it is not up.
	check(ctx context.Context, in *instance, r *resource) (status, string)
	// faults tells what would keep r from running on this node. mounted: an
	// earlier resource may bring files that are not there yet.
	faults(s *service, r *resource, mounted bool) []error
}

var drivers = map[string]driver{"app": appDriver{}, "ocf": &ocfDriver{}, "systemd": systemdDriver{}}
