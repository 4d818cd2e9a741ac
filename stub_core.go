package main

// The core's side of the cluster's data, until the core has it.

func (dataDue) apply(*core) *monitored   { return nil }
func (peerEvent) apply(*core) *monitored { return nil }
