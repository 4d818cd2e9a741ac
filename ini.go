// ini.go: the syntax of node.conf and of service files (design.md §3):
// sections, `key = value`, `key@node = value`, comments. It keeps every line
// as it was written, so that a program's edit leaves a person's text alone.
// What the keys mean is not known here.

package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// iniLine is one line, and the assignment that it makes, if any.
type iniLine struct {
	raw        string // without its newline
	section    string
	key, scope string // key is empty where nothing is assigned
	begin, end int    // of the value in raw
}

func (l iniLine) value() string { return l.raw[l.begin:l.end] }

// ini is a parsed file. Line n of the file is lines[n-1].
type ini struct {
	name  string // how errors call the file
	lines []iniLine
}

var keyPattern = regexp.MustCompile(`^([A-Za-z0-9_.-]+)(?:@([A-Za-z0-9_.-]+))?$`)

// parseINI reads text. The error joins one error a faulty line, as
// `name:line: what`; it never quotes a line, which may hold a secret.
func parseINI(name, text string) (*ini, error) {
	if len(text) > iniSizeLimit {
		return nil, fmt.Errorf("%s: larger than %d bytes", name, iniSizeLimit)
	}
	doc := &ini{name: name}
	section := ""
	seen := map[[3]string]int{}
	var faults []error
	for number, raw := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		line, err := parseLine(raw, section)
		if err == nil && line.key != "" {
			id := [3]string{line.section, line.key, line.scope}
			if first, twice := seen[id]; twice {
				err = fmt.Errorf("%s is already set in line %d; keep one of them", parameter(line.section, line.key, line.scope), first)
			}
			seen[id] = number + 1
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s:%d: %w", name, number+1, err))
		}
		section = line.section
		doc.lines = append(doc.lines, line)
	}
	return doc, errors.Join(faults...)
}

func parseLine(raw, section string) (iniLine, error) {
	line := iniLine{raw: raw, section: section}
	text := strings.TrimSpace(raw)
	switch {
	case !utf8.ValidString(raw) || strings.ContainsRune(raw, 0):
		return line, errors.New("not text in UTF-8")
	case text == "" || text[0] == '#' || text[0] == ';':
		return line, nil
	case text[0] == '[':
		text = text[:valueEnd(text)]
		if !strings.HasSuffix(text, "]") || strings.TrimSpace(text[1:len(text)-1]) == "" {
			return line, errors.New("a section is written [name]")
		}
		line.section = strings.TrimSpace(text[1 : len(text)-1])
		return line, nil
	}
	equals := strings.IndexByte(raw, '=')
	if equals < 0 {
		return line, errors.New("neither a [section], nor `key = value`, nor a comment")
	}
	if section == "" {
		return line, errors.New("a key before the first [section]")
	}
	match := keyPattern.FindStringSubmatch(strings.TrimSpace(raw[:equals]))
	if match == nil {
		return line, errors.New("a key is made of letters, digits, `_`, `.` and `-`, and may end in @nodename")
	}
	line.key, line.scope = match[1], match[2]
	line.begin = equals + 1
	for line.begin < len(raw) && (raw[line.begin] == ' ' || raw[line.begin] == '\t') {
		line.begin++
	}
	line.end = line.begin + valueEnd(raw[line.begin:])
	return line, nil
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' || c == '\r' }

// valueEnd tells how long the value at the start of s is: up to a comment (a
// `#` at the start or after a blank, outside of quotes), without the blanks at
// its end. A `;` begins a comment at the start of a line only, since commands
// hold it.
func valueEnd(s string) int {
	end := len(s)
scan:
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '"', '\'':
			if n := strings.IndexByte(s[i+1:], c); n >= 0 {
				i += n + 1
			}
		case '#':
			if i == 0 || isBlank(s[i-1]) {
				end = i
				break scan
			}
		}
	}
	return len(strings.TrimRight(s[:end], " \t\r"))
}

// splitWords cuts a value into words at blanks, as a shell would, with single
// and double quotes and nothing else: no variables, no escapes.
func splitWords(s string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"' || c == '\'':
			n := strings.IndexByte(s[i+1:], c)
			if n < 0 {
				return nil, fmt.Errorf("the quote %c is not closed", c)
			}
			word.WriteString(s[i+1 : i+1+n])
			inWord, i = true, i+1+n
		case isBlank(c):
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

// parameter is how people name a key: section.key or section.key@node.
func parameter(section, key, scope string) string {
	if scope != "" {
		key += "@" + scope
	}
	return section + "." + key
}

// splitParameter is the opposite of parameter. A section may hold dots, as
// stonith#node.example does; a key may not where it is named this way.
func splitParameter(name string) (section, key, scope string, err error) {
	name, scope, scoped := strings.Cut(name, "@")
	dot := strings.LastIndexByte(name, '.')
	if dot <= 0 || dot == len(name)-1 || scoped && scope == "" {
		return "", "", "", fmt.Errorf("a parameter is written section.key or section.key@node, not %q", name)
	}
	return name[:dot], name[dot+1:], scope, nil
}

// find returns the index of the line that sets key, or -1.
func (doc *ini) find(section, key, scope string) int {
	for i, line := range doc.lines {
		if line.key == key && line.section == section && line.scope == scope {
			return i
		}
	}
	return -1
}

// value returns what the file says for key on node: the scoped value first.
func (doc *ini) value(section, key, node string) (value string, number int, ok bool) {
	i := doc.find(section, key, node)
	if i < 0 {
		i = doc.find(section, key, "")
	}
	if i < 0 {
		return "", 0, false
	}
	return doc.lines[i].value(), i + 1, true
}

// set assigns value, on the line where the key is set already, or else where
// a reader would look for it. It fails on a value that would be read back as
// another.
func (doc *ini) set(section, key, scope, value string) error {
	name := parameter(section, key, scope)
	if header, err := parseLine("["+section+"]", ""); err != nil || header.section != section || strings.ContainsAny(section, "[]\n\r") {
		return fmt.Errorf("cannot set %s: %q is no name for a section", name, section)
	}
	i := doc.find(section, key, scope)
	raw := key + atScope(scope) + " = " + value
	if i >= 0 {
		raw = doc.lines[i].withValue(value)
	}
	line, err := parseLine(raw, section)
	switch {
	case err != nil:
		return fmt.Errorf("cannot set %s: %w", name, err)
	case line.key != key || line.scope != scope:
		return fmt.Errorf("cannot set %s: this is no name for a parameter", name)
	case strings.ContainsAny(value, "\n\r") || line.value() != value:
		return fmt.Errorf("cannot set %s: a value has one line, no blanks around it, and ` #` in quotes only", name)
	case i >= 0:
		doc.lines[i] = line
	default:
		doc.insert(line)
	}
	return nil
}

// withValue is the line with another value, its comment kept.
func (l iniLine) withValue(value string) string {
	head, tail := l.raw[:l.begin], l.raw[l.end:]
	if strings.HasSuffix(head, "=") {
		head += " "
	}
	if tail != "" && !isBlank(tail[0]) {
		tail = " " + tail
	}
	return head + value + tail
}

// insert puts a new line behind its key's other scopes, else behind the
// comment that explains it, else at its section's end, else into a new section.
func (doc *ini) insert(line iniLine) {
	at, rank := -1, 0
	explained := regexp.MustCompile(`^\s*[#;]\s*` + regexp.QuoteMeta(line.key) + `\s*=`)
	for i, other := range doc.lines {
		r := 0
		switch {
		case other.section != line.section:
		case other.key == line.key:
			r = 3
		case explained.MatchString(other.raw):
			r = 2
		case strings.TrimSpace(other.raw) != "":
			r = 1
		}
		if r > rank || r == rank && r != 2 && r > 0 { // the first explanation, the last of the others
			at, rank = i, r
		}
	}
	if at < 0 {
		if n := len(doc.lines); n > 0 && strings.TrimSpace(doc.lines[n-1].raw) != "" {
			doc.lines = append(doc.lines, iniLine{})
		}
		doc.lines = append(doc.lines, iniLine{raw: "[" + line.section + "]", section: line.section})
		at = len(doc.lines) - 1
	}
	doc.lines = append(doc.lines[:at+1], append([]iniLine{line}, doc.lines[at+1:]...)...)
}

func atScope(scope string) string {
	if scope == "" {
		return ""
	}
	return "@" + scope
}

// unset removes the assignment and tells whether there was one.
func (doc *ini) unset(section, key, scope string) bool {
	i := doc.find(section, key, scope)
	if i < 0 {
		return false
	}
	doc.lines = append(doc.lines[:i], doc.lines[i+1:]...)
	return true
}

func (doc *ini) String() string {
	var text strings.Builder
	for _, line := range doc.lines {
		text.WriteString(line.raw)
		text.WriteByte('\n')
	}
	return text.String()
}
