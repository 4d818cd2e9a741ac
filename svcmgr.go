// svcmgr.go: the commands on services.

package main

import (
	"errors"
	"flag"
)

// serviceFlag is the option that names a service.
func serviceFlag(flags *flag.FlagSet) func() (string, error) {
	name := flags.String("s", "", "the service `SVCNAME`")
	return func() (string, error) {
		if *name == "" {
			return "", usageError("%w", errors.New("name a service: svcmgr -s <svcname> …"))
		}
		if err := checkServiceName(*name); err != nil {
			return "", usageError("-s: %w", err)
		}
		return *name, nil
	}
}
