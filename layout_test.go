package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A flat package has no walls (design.md §2). These are they.

// coreFiles are those that decide and touch nothing. Some come later.
var coreFiles = []string{"monitor.go", "order.go", "restart.go", "link.go", "claim.go", "lease.go", "placement.go", "beat.go"}

// purePackages are what a core file may import: they compute. Clock, network,
// file, lock, goroutine and log are not among them, nor random numbers, which
// would make two runs of the same events differ.
var purePackages = []string{
	"bytes", "cmp", "errors", "fmt", "iter", "maps", "math", "math/bits", "slices", "sort", "strconv", "strings", "time", "unicode", "unicode/utf8",
}

// worldlyNames are what pure packages have that is not pure: the clock of
// time, what fmt prints and reads.
var worldlyNames = map[string][]string{
	"time": {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer", "Ticker", "Timer", "Local", "LoadLocation"},
	"fmt":  {"Print", "Printf", "Println", "Scan", "Scanf", "Scanln", "Fprint", "Fprintf", "Fprintln", "Fscan", "Fscanf", "Fscanln"},
}

// cryptoPackages are for crypto.go alone, where the argument stands why their
// use is safe.
var cryptoPackages = []string{
	"crypto/aes", "crypto/cipher", "crypto/des", "crypto/hkdf", "crypto/hmac", "crypto/pbkdf2", "crypto/rc4", "golang.org/x/crypto",
}

// linesLimit: a file over it is two files.
const linesLimit = 600

// allowedModules are all that go.mod may require.
var allowedModules = []string{"golang.org/x/sys", "golang.org/x/crypto"}

// layoutFaults checks one source file that is not a test.
func layoutFaults(name, text string) (faults []string) {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, text, parser.SkipObjectResolution)
	if err != nil {
		return []string{err.Error()}
	}
	fault := func(at token.Pos, format string, args ...any) {
		faults = append(faults, fmt.Sprintf("%s: %s", files.Position(at), fmt.Sprintf(format, args...)))
	}
	if n := strings.Count(text, "\n"); n > linesLimit {
		fault(file.Package, "%d lines; over %d it is two files", n, linesLimit)
	}
	core := slices.Contains(coreFiles, name)
	imported := map[string]string{} // path by the name in the file
	for _, spec := range file.Imports {
		path, _ := strconv.Unquote(spec.Path.Value) // the parser has read it
		local := path[strings.LastIndexByte(path, '/')+1:]
		if spec.Name != nil {
			local = spec.Name.Name
		}
		imported[local] = path
		if name != "crypto.go" && slices.ContainsFunc(cryptoPackages, func(p string) bool { return path == p || strings.HasPrefix(path, p+"/") }) {
			fault(spec.Pos(), "%s is for crypto.go", path)
		}
		if core && (!slices.Contains(purePackages, path) || local == ".") {
			fault(spec.Pos(), "%s touches the world, and the core does not", path)
		}
	}
	if core {
		coreFaults(file, imported, fault)
	}
	return faults
}

// coreFaults finds what a core file does to the world without an import that
// would show it.
func coreFaults(file *ast.File, imported map[string]string, fault func(token.Pos, string, ...any)) {
	ast.Inspect(file, func(node ast.Node) bool {
		switch n := node.(type) {
		case *ast.GoStmt:
			fault(n.Pos(), "a goroutine in the core")
		case *ast.SelectStmt, *ast.SendStmt, *ast.ChanType:
			fault(n.Pos(), "a channel in the core")
		case *ast.CallExpr:
			if name, ok := n.Fun.(*ast.Ident); ok && (name.Name == "print" || name.Name == "println") {
				fault(n.Pos(), "%s in the core", name.Name)
			}
		case *ast.SelectorExpr:
			if local, ok := n.X.(*ast.Ident); ok && slices.Contains(worldlyNames[imported[local.Name]], n.Sel.Name) {
				fault(n.Pos(), "%s.%s touches the world, and the core does not", local.Name, n.Sel.Name)
			}
		}
		return true
	})
}

// moduleFaults checks the text of a go.mod.
func moduleFaults(text string) (faults []string) {
	block := ""
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "//")
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
			continue
		case words[0] == ")":
			block = ""
			continue
		case len(words) == 2 && words[1] == "(":
			block = words[0]
			continue
		case block != "":
			words = append([]string{block}, words...)
		}
		switch words[0] {
		case "module", "go", "toolchain":
		case "require":
			if len(words) < 3 || !slices.Contains(allowedModules, words[1]) {
				faults = append(faults, fmt.Sprintf("go.mod:%d: %s; only %s may be required", i+1, strings.Join(words, " "), strings.Join(allowedModules, " and ")))
			}
		default: // replace, tool, and what else can bring in another module
			faults = append(faults, fmt.Sprintf("go.mod:%d: %s", i+1, strings.Join(words, " ")))
		}
	}
	return faults
}

func TestLayout(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 20 {
		t.Fatalf("found %d files, %v", len(files), err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		for _, fault := range layoutFaults(name, readText(t, name)) {
			t.Error(fault)
		}
	}
	for _, fault := range moduleFaults(readText(t, "go.mod")) {
		t.Error(fault)
	}
	// Flat: there is no package beside this one.
	nested, err := filepath.Glob("*/*.go")
	if err != nil || len(nested) > 0 {
		t.Errorf("Go files in folders: %q, %v", nested, err)
	}
	if _, err := os.Stat("crypto.go"); err != nil {
		t.Error("the file that may import ciphers is gone; so is what this test is about")
	}
}

func TestLayoutFaultsAreFound(t *testing.T) {
	t.Parallel()
	source := func(imports, body string) string { return "package main\n" + imports + "\n" + body }
	tests := []struct {
		name, file, text string
		want             string // in the one fault; empty: none
	}{
		{"pure core", "monitor.go", source(`import ("fmt"; "time"; "slices")`, "func f(t time.Time) string { return fmt.Sprintf(`%v`, t.Add(time.Second)) + strings.Time.Now }"), ""},
		{"the world, elsewhere", "daemon.go", source(`import ("os"; "time")`, "func f() { go os.Exit(1); time.Sleep(1); select {} }"), ""},
		{"file", "monitor.go", source(`import "os"`, ""), `os touches`},
		{"network", "lease.go", source(`import "net"`, ""), `net touches`},
		{"log", "placement.go", source(`import "log/slog"`, ""), `log/slog touches`},
		{"lock", "lease.go", source(`import "sync"`, ""), `sync touches`},
		{"randomness", "lease.go", source(`import "math/rand/v2"`, ""), `math/rand/v2 touches`},
		{"under another name", "monitor.go", source(`import fmt "os"`, ""), `os touches`},
		{"under no name", "monitor.go", source(`import . "time"`, ""), `time touches`},
		{"clock", "monitor.go", source(`import "time"`, "func f() time.Time { return time.Now() }"), `monitor.go:3:29: time.Now touches`},
		{"clock as a value", "monitor.go", source(`import "time"`, "var now = time.Now"), `time.Now touches`},
		{"clock under another name", "monitor.go", source(`import clock "time"`, "var now = clock.Since"), `clock.Since touches`},
		{"timer", "lease.go", source(`import "time"`, "var x *time.Timer"), `time.Timer touches`},
		{"output", "monitor.go", source(`import "fmt"`, "func f() { fmt.Println() }"), `fmt.Println touches`},
		{"output without an import", "monitor.go", source("", "func f() { println() }"), `println in the core`},
		{"goroutine", "monitor.go", source("", "func f() { go f() }"), `a goroutine`},
		{"channel", "monitor.go", source("", "func f(c chan int) {}"), `a channel`},
		{"cipher", "listener.go", source(`import "crypto/aes"`, ""), `crypto/aes is for crypto.go`},
		{"mode of a cipher", "main.go", source(`import "crypto/cipher"`, ""), `crypto/cipher is for crypto.go`},
		{"key derivation", "config.go", source(`import "crypto/hkdf"`, ""), `crypto/hkdf is for crypto.go`},
		{"derivation from a password", "client.go", source(`import s "golang.org/x/crypto/scrypt"`, ""), `golang.org/x/crypto/scrypt is for crypto.go`},
		{"its own file", "crypto.go", source(`import ("crypto/aes"; "crypto/cipher"; "crypto/hkdf"; "golang.org/x/crypto/scrypt")`, ""), ""},
		{"random bytes and sums are no ciphers", "daemon.go", source(`import ("crypto/rand"; "crypto/sha256")`, ""), ""},
		{"600 lines", "show.go", "package main\n" + strings.Repeat("\n", 599), ""},
		{"601 lines", "show.go", "package main\n" + strings.Repeat("\n", 600), "601 lines"},
		{"no Go", "show.go", "package", "show.go:1"},
	}
	for _, test := range tests {
		faults := layoutFaults(test.file, test.text)
		if test.want == "" && len(faults) > 0 || test.want != "" && (len(faults) != 1 || !strings.Contains(faults[0], test.want)) {
			t.Errorf("%s: faults = %q, want %q", test.name, faults, test.want)
		}
	}
	for text, want := range map[string]int{
		"module agentd\n\ngo 1.26\n\nrequire (\n\tgolang.org/x/sys v0.1.0\n\tgolang.org/x/crypto v0.1.0 // indirect\n)\n": 0,
		"require golang.org/x/sys v0.1.0 // c\n":                                                  0,
		"require example.com/x v1.0.0\n":                                                          1,
		"require (\n\tgolang.org/x/net v0.1.0\n\texample.com/y v1.0.0 // indirect\n)\n":           2,
		"require golang.org/x/sysother v0.1.0\n":                                                  1,
		"replace golang.org/x/sys => ../sys\n":                                                    1,
		"tool example.com/x\n":                                                                    1,
		"replace (\n\tgolang.org/x/sys => ../sys\n)\nrequire (\n\tgolang.org/x/sys v0.1.0\n)\n//": 1,
	} {
		if faults := moduleFaults(text); len(faults) != want {
			t.Errorf("%q: faults = %q, want %d", text, faults, want)
		}
	}
}
