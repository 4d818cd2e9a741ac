package main

// Until the core takes these events: they change nothing.

func (clusterEvent) apply(*core) *monitored { return nil }
func (beatDue) apply(*core) *monitored      { return nil }
func (beatEvent) apply(*core) *monitored    { return nil }
func (dataDue) apply(*core) *monitored      { return nil }
func (peerEvent) apply(*core) *monitored    { return nil }
func (votesKept) apply(*core) *monitored    { return nil }
func (guardEvent) apply(*core) *monitored   { return nil }
