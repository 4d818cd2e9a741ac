// version.go: the order of versions, which is RPM's
// (installation-status.md, Version order).

package main

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
)

// version is [epoch:]version[-release].
type version struct {
	epoch, base, release string
	hasRelease           bool
}

var versionPattern = regexp.MustCompile(`^([0-9]+:)?[0-9A-Za-z._~^+-]{1,128}$`)

// parseVersion reads a version in ASCII.
func parseVersion(s string) (version, error) {
	if !versionPattern.MatchString(s) {
		return version{}, errNotVersion(s)
	}
	var v version
	epoch, rest, found := strings.Cut(s, ":")
	if !found {
		epoch, rest = "0", s
	}
	v.epoch = epoch
	v.base = rest
	if i := strings.LastIndexByte(rest, '-'); i >= 0 {
		v.base, v.release, v.hasRelease = rest[:i], rest[i+1:], true
	}
	if !strings.ContainsFunc(v.base, isAlphanumeric) {
		return version{}, errNotVersion(s)
	}
	return v, nil
}

func errNotVersion(s string) error {
	return fmt.Errorf("%q is not a version ([epoch:]version[-release] of letters, digits and ._~^+-)", shortened(s))
}

// compareVersions returns -1, 0 or 1.
func compareVersions(a, b version) int {
	if order := cmp.Or(compareNumbers(a.epoch, b.epoch), compareSegments(a.base, b.base)); order != 0 {
		return order
	}
	if !a.hasRelease || !b.hasRelease {
		return compareBools(a.hasRelease, b.hasRelease)
	}
	return compareSegments(a.release, b.release)
}

// compareSegments is the algorithm of RPM's rpmvercmp, as its manual
// (rpm-version(7)) puts it: segments of digits or of letters, between
// separators that do not count; `~` sorts before everything, even the end;
// `^` after the end and before everything else; digits after letters.
func compareSegments(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, isSeparator), strings.TrimLeftFunc(b, isSeparator)
		for _, mark := range []struct {
			char  byte
			order func(has, other bool) int
		}{
			{'~', func(has, other bool) int { return compareBools(other, has) }},
			{'^', func(has, other bool) int {
				if (has && b == "") || (other && a == "") {
					return compareBools(has, other)
				}
				return compareBools(other, has)
			}},
		} {
			has, other := startsWith(a, mark.char), startsWith(b, mark.char)
			if order := mark.order(has, other); order != 0 {
				return order
			}
			if has {
				return compareSegments(a[1:], b[1:])
			}
		}
		if a == "" || b == "" {
			return compareBools(a != "", b != "")
		}
		if isDigit(rune(a[0])) != isDigit(rune(b[0])) {
			return compareBools(isDigit(rune(a[0])), isDigit(rune(b[0])))
		}
		same, compare := isLetter, strings.Compare
		if isDigit(rune(a[0])) {
			same, compare = isDigit, compareNumbers
		}
		var x, y string
		x, a = cutWhile(a, same)
		y, b = cutWhile(b, same)
		if order := compare(x, y); order != 0 {
			return order
		}
	}
}

// compareNumbers compares runs of digits of any length.
func compareNumbers(a, b string) int {
	a, b = strings.TrimLeft(a, "0"), strings.TrimLeft(b, "0")
	return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b))
}

// compareBools sorts false before true.
func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func isDigit(c rune) bool        { return '0' <= c && c <= '9' }
func isLetter(c rune) bool       { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }
func isAlphanumeric(c rune) bool { return isDigit(c) || isLetter(c) }
func isSeparator(c rune) bool    { return !isAlphanumeric(c) && c != '~' && c != '^' }

func startsWith(s string, c byte) bool { return s != "" && s[0] == c }

func cutWhile(s string, in func(rune) bool) (head, tail string) {
	tail = strings.TrimLeftFunc(s, in)
	return s[:len(s)-len(tail)], tail
}
