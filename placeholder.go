// placeholder.go stands for what other files bring; it goes away with them.

package main

import (
	"context"
	"time"
)

type appDriver struct{}

func (appDriver) start(ctx context.Context, in *instance, r *resource) error { return nil }
func (appDriver) stop(ctx context.Context, in *instance, r *resource) error  { return nil }
func (appDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	return statusUndef, ""
}
func (appDriver) faults(s *service, r *resource, mounted bool) []error { return nil }

type instance struct {
	service *service
	run     func(ctx context.Context, r *resource, c resourceCommand) (commandResult, error)
}

// resourceCommand is one run of a program for a resource.
type resourceCommand struct {
	argv    []string
	env     []string      // beside what every command gets
	timeout time.Duration // after which its session is killed
	quiet   bool          // a check: what it prints is logged only if the caller says so
}

// commandResult is how a command ended by itself.
type commandResult struct {
	exit   int
	output string // stdout and stderr, the first 64 KiB
}
