package main

// plant is a bug, put into the core from outside: what it is born with, what
// comes in, what goes out. A nil plant changes nothing.
type plant struct {
	name  string
	born  func(n *simNode, b *birth)
	event func(n *simNode, e event) event
	after func(n *simNode, e event, effects *[]effect)
}

func (p *plant) is(name string) bool { return p != nil && p.name == name }

func (p *plant) birth(n *simNode, b *birth) {
	if p != nil && p.born != nil {
		p.born(n, b)
	}
}

func (p *plant) in(n *simNode, e event) event {
	if p != nil && p.event != nil {
		return p.event(n, e)
	}
	return e
}

func (p *plant) out(n *simNode, e event, effects *[]effect) {
	if p != nil && p.after != nil {
		p.after(n, e, effects)
	}
}
