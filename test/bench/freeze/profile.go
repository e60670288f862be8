package freeze

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"podstasis.dev/stasis/internal/checkpoint"
)

// profile says where the time of a freeze window went.
type profile []part

type part struct {
	name string
	took time.Duration
}

// sections are the parts of a capture by CRIU, each with what the log says when it
// begins. A part goes on until another begins.
var sections = []struct{ says, name string }{
	{"freezing cgroup", waits},
	{"freezer.state=", "CRIU: seize the processes"},
	{"Collecting mappings (pid", "CRIU: list mappings (smaps)"},
	{"Collecting fds (pid", "CRIU: files and sockets, parasite"},
	{"Dumping pages (type", "CRIU: memory"},
	{"Dumping core (pid", "CRIU: registers, credentials, timers"},
	{"cg: adding cgroup", "CRIU: cgroups"},
	{"mnt: Dumping mount", "CRIU: mounts"},
	{"mnt: \t", "CRIU: mounts"},
	{" IPC namespace", "CRIU: IPC namespace"},
	{" NET namespace", "CRIU: network namespace"},
	{" UTS namespace", "CRIU: end"},
}

// atStart is what comes before the first section, waits until the Pod stands still; outside
// is what is in no log of CRIU.
const (
	atStart = "CRIU: start"
	waits   = "CRIU: wait for the freeze"
	outside = "waking CRIU, what it says at its end; archives"
)

// sectionsOf sums up how long each section of a log of CRIU took, and all of it. Lines
// begin with the time since CRIU's start.
func sectionsOf(log string) (parts profile, all time.Duration) {
	current := atStart
	add := func(name string, d time.Duration) {
		for i := range parts {
			if parts[i].name == name {
				parts[i].took += d
				return
			}
		}
		parts = append(parts, part{name, d})
	}
	for line := range strings.Lines(log) {
		stamp, text, found := strings.Cut(strings.TrimPrefix(line, "("), ") ")
		seconds, err := strconv.ParseFloat(stamp, 64)
		if !found || err != nil || !strings.HasPrefix(line, "(") {
			continue
		}
		at := time.Duration(seconds * float64(time.Second)).Round(time.Microsecond)
		add(current, at-all)
		all = at
		for _, s := range sections {
			if strings.Contains(text, s.says) {
				current = s.name
			}
		}
	}
	return parts, all
}

// readProfile reads what a checkpoint's directory tells of its freeze window; that of one
// of its containers, which stands for the others.
func readProfile(dir, container string) (profile, error) {
	data, err := os.ReadFile(filepath.Join(dir, checkpoint.ManifestName))
	if err != nil {
		return nil, err
	}
	var m checkpoint.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, err
	}
	phases := map[string]time.Duration{}
	for _, p := range m.Phases {
		phases[p.Name] = p.Duration
	}
	log, err := os.ReadFile(filepath.Join(dir, "containers", container, "dump.log"))
	if err != nil {
		return nil, err
	}
	inside, all := sectionsOf(string(log))
	inside = slices.DeleteFunc(inside, func(p part) bool {
		if p.name == atStart || p.name == waits { // before the freeze
			all -= p.took
			return true
		}
		return false
	})
	whole := profile{{"freeze", phases["freeze"]}, {outside, phases["capture"] - all}}
	whole = append(whole, inside...)
	return append(whole, part{"thaw", phases["thaw"]}), nil
}

// Stats are CRIU's own figures of a capture.
type Stats struct {
	// Freezing is how long it took to stop the processes, with CRIU's wait for that; Frozen how long CRIU held them;
	// MemDump how long it took to get pages out of them; MemWrite, to write those.
	Freezing, Frozen, MemDump, MemWrite time.Duration
}

// readStats reads a file stats-dump.
func readStats(name string) (Stats, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return Stats{}, err
	}
	s, err := parseStats(data)
	if err != nil {
		return s, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// parseStats reads CRIU's form: two magic numbers, the size, and a message whose first
// field is the message of figures of a dump, in microseconds.
func parseStats(data []byte) (Stats, error) {
	const head = 12
	if len(data) < head || int(binary.LittleEndian.Uint32(data[8:])) != len(data)-head {
		return Stats{}, errors.New("it is no file of CRIU's statistics")
	}
	number, kind, n := protowire.ConsumeTag(data[head:])
	if n < 0 || number != 1 || kind != protowire.BytesType {
		return Stats{}, errors.New("it has no statistics of a dump")
	}
	message, n := protowire.ConsumeBytes(data[head+n:])
	if n < 0 {
		return Stats{}, protowire.ParseError(n)
	}
	var s Stats
	into := map[protowire.Number]*time.Duration{1: &s.Freezing, 2: &s.Frozen, 3: &s.MemDump, 4: &s.MemWrite}
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return s, protowire.ParseError(n)
		}
		message = message[n:]
		if to := into[number]; to != nil && kind == protowire.VarintType {
			micros, n := protowire.ConsumeVarint(message)
			if n < 0 {
				return s, protowire.ParseError(n)
			}
			*to = time.Duration(micros) * time.Microsecond
			message = message[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
			return s, protowire.ParseError(n)
		}
		message = message[n:]
	}
	return s, nil
}

// profiled are the shapes whose windows are taken apart.
var profiled = []Shape{least, gib1}

// profiles are the tables of where the time went.
func (r *Report) profiles() string {
	var b strings.Builder
	for _, result := range r.Results {
		if len(result.Profiles) == 0 || !slices.Contains(profiled, result.Shape) {
			continue
		}
		fmt.Fprintf(&b, "\n| %s, %s: part of the freeze window | ms |\n| --- | ---: |\n", result.Contender, result.Shape)
		var names []string
		for _, p := range result.Profiles {
			for _, part := range p {
				if !slices.Contains(names, part.name) {
					names = append(names, part.name)
				}
			}
		}
		for _, name := range names {
			fmt.Fprintf(&b, "| %s | %.1f |\n", name, ms(result.part(name)))
		}
		var stats [4][]time.Duration
		for _, s := range result.Stats {
			for i, d := range []time.Duration{s.Freezing, s.Frozen, s.MemDump, s.MemWrite} {
				stats[i] = append(stats[i], d)
			}
		}
		fmt.Fprintf(&b, "| CRIU's statistics: frozen, memory dump, memory write | %.1f, %.1f, %.1f |\n",
			ms(median(stats[1])), ms(median(stats[2])), ms(median(stats[3])))
	}
	return b.String()
}

// part is the median of a part of the window.
func (r *Result) part(name string) time.Duration {
	var all []time.Duration
	for _, p := range r.Profiles {
		var d time.Duration
		for _, part := range p {
			if part.name == name {
				d = part.took
			}
		}
		all = append(all, d)
	}
	return median(all)
}
