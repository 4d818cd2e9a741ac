package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// requestOf parses a request as it is written.
func requestOf(text string) (request, error) {
	written, err := parseRequestJSON([]byte(text))
	if err != nil {
		return request{}, err
	}
	return parseRequest(written, "n2")
}

func TestRequestOptions(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text string
		want       options
	}{
		{"none", `{"action":"ping"}`, options{}},
		{"empty", `{"action":"ping","options":{}}`, options{}},
		{"null for all", `{"action":"ping","options":null}`, options{}},
		{"text and flag", `{"action":"daemon_stop","options":{"thr_id":"listener","force":true}}`, options{"thr_id": "listener", "force": true}},
		{"null is not given", `{"action":"daemon_stop","options":{"thr_id":null,"force":null}}`, options{}},
		{"duration and list", `{"action":"cluster_status","options":{"timeout":"1m30s","exclude":["a","b"],"gate":"start"}}`, options{"timeout": 90 * time.Second, "exclude": []string{"a", "b"}, "gate": "start"}},
		{"a bare number in a string is seconds", `{"action":"cluster_status","options":{"timeout":"5"}}`, options{"timeout": 5 * time.Second}},
		{"empty list", `{"action":"cluster_status","options":{"exclude":[]}}`, options{"exclude": []string{}}},
		{"members that a newer agent may add", `{"action":"ping","options":{},"future":[1]}`, options{}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r, err := requestOf(test.text)
			if err != nil || !reflect.DeepEqual(r.options, test.want) {
				t.Errorf("options = %v, %v; want %v", r.options, err, test.want)
			}
			if r.sender != "n2" {
				t.Errorf("sender = %q", r.sender)
			}
		})
	}
}

// Each error names what it is about, and what there is instead.
func TestRequestErrors(t *testing.T) {
	t.Parallel()
	all := slices.Sorted(maps.Keys(actions))
	tests := []struct {
		name, text string
		want       []string
	}{
		{"unknown action", `{"action":"deamon_status"}`, append([]string{`unknown action "deamon_status"`}, all...)},
		{"no action", `{}`, append([]string{`unknown action ""`}, all...)},
		{"unknown option", `{"action":"daemon_stop","options":{"thread":"x"}}`, []string{`unknown option "thread"`, "daemon_stop", "force, thr_id"}},
		{"unknown option where there are none", `{"action":"ping","options":{"x":1}}`, []string{`unknown option "x"`, "ping takes none"}},
		{"unknown option, even if null", `{"action":"ping","options":{"x":null}}`, []string{`unknown option "x"`}},
		{"number for a string", `{"action":"daemon_stop","options":{"thr_id":7}}`, []string{`"thr_id"`, "daemon_stop", "a string", "7"}},
		{"string for a flag", `{"action":"daemon_stop","options":{"force":"yes"}}`, []string{`"force"`, "true or false", `"yes"`}},
		{"number for a flag", `{"action":"daemon_stop","options":{"force":1}}`, []string{`"force"`, "true or false"}},
		{"string for a list", `{"action":"cluster_status","options":{"exclude":"n1"}}`, []string{`"exclude"`, "a list of strings", `"n1"`}},
		{"numbers in a list", `{"action":"cluster_status","options":{"exclude":["n1",2]}}`, []string{`"exclude"`, "a list of strings"}},
		{"object for a list", `{"action":"cluster_status","options":{"exclude":{"n1":true}}}`, []string{`"exclude"`, "a list of strings"}},
		{"number for a duration", `{"action":"cluster_status","options":{"timeout":5}}`, []string{`"timeout"`, `"5s"`}},
		{"no duration", `{"action":"cluster_status","options":{"timeout":"soon"}}`, []string{`"timeout"`, `"5s"`, "soon"}},
		{"negative duration", `{"action":"cluster_status","options":{"timeout":"-1s"}}`, []string{`"timeout"`}},
		{"a list of options", `{"action":"ping","options":[]}`, []string{`{"action": "…", "options": {…}}`}},
		{"no JSON", `ping`, []string{`{"action": "…", "options": {…}}`}},
		{"a string", `"ping"`, []string{`{"action": "…", "options": {…}}`}},
		{"nothing", ``, []string{`{"action": "…", "options": {…}}`}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			_, err := requestOf(test.text)
			for _, want := range test.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error = %v; want %q in it", err, want)
				}
			}
		})
	}
}

// An error is sent back, over UDP too: it quotes little of what was sent.
func TestRequestErrorsAreShort(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 10_000)
	for name, text := range map[string]string{
		"value":  `{"action":"daemon_stop","options":{"force":"` + long + `"}}`,
		"action": `{"action":"` + long + `"}`,
		"option": `{"action":"ping","options":{"` + long + `":1}}`,
	} {
		_, err := requestOf(text)
		if said := fmt.Sprint(err); err == nil || len(said) > 1000 {
			t.Errorf("%s: the error has %d bytes: %.100s…", name, len(said), said)
		}
	}
	// A letter is not cut in two.
	if got := shortened(strings.Repeat("é", 100)); !strings.HasPrefix(got, strings.Repeat("é", 30)) || strings.Contains(got, "\ufffd") || len(got) > 70 {
		t.Errorf("shortened = %q", got)
	}
}

// null is no string: what is meant by a name that is empty?
func TestRequestListOfNull(t *testing.T) {
	t.Parallel()
	if r, err := requestOf(`{"action":"cluster_status","options":{"exclude":["n1",null]}}`); err == nil {
		t.Errorf("accepted as %q", r.options["exclude"])
	}
}

// What a person types for an option arrives as the value that he meant.
func TestOptionTypesEncodeAndDecodeAgree(t *testing.T) {
	t.Parallel()
	tests := []struct {
		t    optionType
		text string
		want any // nil: refused when typed, or else when received
	}{
		{optionText, "", ""},
		{optionText, `a "b" é`, `a "b" é`},
		{optionText, "true", "true"},
		{optionText, "null", "null"},
		{optionFlag, "true", true},
		{optionFlag, "false", false},
		{optionFlag, "yes", nil},
		{optionFlag, "", nil},
		{optionList, `["a","b c"]`, []string{"a", "b c"}},
		{optionList, `[]`, []string{}},
		{optionList, `a,b`, nil},
		{optionList, `[1]`, nil},
		{optionDuration, "5s", 5 * time.Second},
		{optionDuration, "90", 90 * time.Second},
		{optionDuration, "soon", nil},
		{optionDuration, "", nil},
	}
	for _, test := range tests {
		raw, err := test.t.encode(test.text)
		var got any
		if err == nil {
			if !json.Valid(raw) {
				t.Errorf("%s %q is encoded as %s", test.t, test.text, raw)
			}
			got, err = test.t.decode(raw)
		}
		if test.want == nil {
			if err == nil {
				t.Errorf("%q is accepted as %s: %v", test.text, test.t, got)
			}
		} else if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%q as %s arrives as %v, %v; want %v", test.text, test.t, got, err, test.want)
		}
	}
}

func TestEncodeOptions(t *testing.T) {
	t.Parallel()
	got, err := encodeOptions("cluster_status", []string{"timeout=5s", `exclude=["n1"]`, "gate=a=b"})
	want := map[string]json.RawMessage{"timeout": json.RawMessage(`"5s"`), "exclude": json.RawMessage(`["n1"]`), "gate": json.RawMessage(`"a=b"`)}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("options = %s, %v; want %s", got, err, want)
	}
	for word, want := range map[string]string{
		"timeout":    `"timeout" is not key=value`,
		"timeot=5s":  `unknown option "timeot" of cluster_status; there are: exclude, gate, timeout, version`,
		"exclude=n1": `exclude: "n1" is not a list of strings, as ["a", "b"]`,
	} {
		if _, err := encodeOptions("cluster_status", []string{word}); err == nil || err.Error() != want {
			t.Errorf("%s: error = %v, want %s", word, err, want)
		}
	}
	// An action that this version does not know may be one of the daemon's.
	if got, err := encodeOptions("future", []string{"x=1"}); err != nil || string(got["x"]) != `"1"` {
		t.Errorf("options of an unknown action = %s, %v", got, err)
	}
}

// Data stands in each reply with status 0, if only as null, and in none with
// status 1.
func TestReplyShape(t *testing.T) {
	t.Parallel()
	w := newGuardWorld(t)
	d := &daemon{replay: w.guard}
	for name, test := range map[string]struct {
		data any
		err  error
		want string
	}{
		"data":    {map[string]int{"n1": 1}, nil, `{"time":1600000000000,"status":0,"data":{"n1":1}}`},
		"no data": {nil, nil, `{"time":1600000000000,"status":0,"data":null}`},
		"error":   {map[string]int{"n1": 1}, clockError("late"), `{"time":1600000000000,"status":1,"error":"clock: late"}`},
	} {
		got, err := json.Marshal(replyOf(d, test.data, test.err))
		if err != nil || string(got) != test.want {
			t.Errorf("%s: %s, %v; want %s", name, got, err, test.want)
		}
	}
}

func FuzzRequestOptions(f *testing.F) {
	f.Add([]byte(`{"time":1,"to":"n1","action":"cluster_status","options":{"timeout":"5s","exclude":["a"],"gate":null}}`))
	f.Add([]byte(`{"action":"daemon_stop","options":{"thr_id":"listener","force":true}}`))
	f.Add([]byte(`{"ACTION":"ping","Options":{}}`))
	f.Add([]byte(`{"action":"daemon_stop","options":{"force":[]},"options":{"thr_id":"\ud800"}}`))
	f.Add([]byte(`{"action":"cluster_status","options":{"exclude":[null],"timeout":"1e9s"}}`))
	goTypes := map[optionType]reflect.Type{
		optionText: reflect.TypeFor[string](), optionFlag: reflect.TypeFor[bool](),
		optionList: reflect.TypeFor[[]string](), optionDuration: reflect.TypeFor[time.Duration](),
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		written, err := parseRequestJSON(message)
		if err != nil {
			return
		}
		r, err := parseRequest(written, "n2")
		if err != nil {
			return
		}
		known := actions[r.action]
		if known.do == nil {
			t.Fatalf("accepted an action without a handler: %q", r.action)
		}
		for name, v := range r.options {
			declared, is := known.options[name]
			if !is || reflect.TypeOf(v) != goTypes[declared] {
				t.Fatalf("option %q of %q is %T, want %v", name, r.action, v, goTypes[declared])
			}
			// As a person would type it, it is the same value.
			typed := string(written.Options[name])
			if declared == optionText || declared == optionDuration {
				if err := json.Unmarshal(written.Options[name], &typed); err != nil {
					t.Fatal(err)
				}
			}
			raw, err := declared.encode(typed)
			if err != nil {
				t.Fatalf("option %q: %s cannot be typed: %v", name, typed, err)
			}
			if again, err := declared.decode(raw); err != nil || !reflect.DeepEqual(again, v) {
				t.Fatalf("option %q: %s typed is %v, %v; want %v", name, typed, again, err, v)
			}
		}
	})
}
