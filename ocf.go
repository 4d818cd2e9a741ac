package main

import (
	"context"
)

type ocfDriver struct{}

func (ocfDriver) start(ctx context.Context, in *instance, r *resource) error { return nil }
func (ocfDriver) stop(ctx context.Context, in *instance, r *resource) error  { return nil }
func (ocfDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	return statusUndef, ""
}
func (ocfDriver) faults(s *service, r *resource, mounted bool) []error { return nil }

type systemdDriver struct{}

func (systemdDriver) start(ctx context.Context, in *instance, r *resource) error { return nil }
func (systemdDriver) stop(ctx context.Context, in *instance, r *resource) error  { return nil }
func (systemdDriver) check(ctx context.Context, in *instance, r *resource) (status, string) {
	return statusUndef, ""
}
func (systemdDriver) faults(s *service, r *resource, mounted bool) []error { return nil }
