package criu

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/cc"
)

//go:embed refill/refill.c
var refillSource []byte

// refiller is the library as a program, which ends with an error at any access that is not
// its own: it fills the directory that it is told, and ends with 3 if tar should.
var refiller = sync.OnceValues(func() ([]byte, error) {
	program := append(slices.Clone(refillSource), "\nint main(int argc, char **argv) { return argc == 2 && refill(STDIN_FILENO, argv[1]) ? 0 : 3; }\n"...)
	return cc.Compile(program, "-Wshadow", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
})

// refill has it fill a new directory with an archive, and says whether it has.
func refill(t *testing.T, archive []byte) (dir string, done bool) {
	t.Helper()
	built, err := refiller()
	if err != nil {
		t.Fatal(err)
	}
	outer := t.TempDir()
	program, dir := filepath.Join(outer, "refill"), filepath.Join(outer, "dir")
	if err := errors.Join(os.WriteFile(program, built, 0o755), os.Mkdir(dir, 0o755), os.WriteFile(outer+"/archive", archive, 0o600)); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(outer + "/archive")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(program, dir)
	cmd.Stdin = file
	out, err := cmd.CombinedOutput()
	if len(out) > 0 || err != nil && cmd.ProcessState.ExitCode() != 3 {
		t.Fatalf("%v: %s", err, out)
	}
	if at, err := file.Seek(0, 1); err != nil || at != 0 {
		t.Errorf("tar would begin to read at %d: %v", at, err)
	}
	return dir, err == nil
}

// treeOf tells all of a directory.
func treeOf(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	if err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		relative, _ := filepath.Rel(dir, name)
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			what, err = os.Readlink(name)
		case unix.S_IFREG:
			var data []byte
			data, err = os.ReadFile(name)
			what = string(data)
		}
		lines = append(lines, fmt.Sprintf("%s %o %d:%d %d:%x %.100q %d", relative, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Rdev, what, len(what)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestAnArchiveOfASmallFileSystemIsExtractedWithoutTarAsTarDoesIt(t *testing.T) {
	a := newAsIf(t)
	from := filepath.Join(a.dir, "tree")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(from+"/pts/empty/er", 0o755), os.Mkdir(from+"/mqueue", 0o1777), os.Chmod(from+"/mqueue", os.ModeSticky|0o777),
		os.Mkdir(from+"/closed", 0o700), os.WriteFile(from+"/closed/file", []byte("closed"), 0o600), os.Chmod(from+"/closed", 0), os.Chown(from+"/closed", 5, 6),
		os.Symlink("/proc/self/fd", from+"/fd"), os.Lchown(from+"/fd", 7, 8), os.WriteFile(from+"/termination-log", nil, 0o666),
		os.WriteFile(from+"/pts/lock", bytes.Repeat([]byte("content "), 9000), 0o640), os.Chown(from+"/pts/lock", 1000, 2000),
		os.WriteFile(from+"/setuid", []byte("x"), 0o755), os.Chown(from+"/setuid", 1, 2), os.Chmod(from+"/setuid", os.ModeSetuid|os.ModeSetgid|0o755),
		os.WriteFile(from+"/"+strings.Repeat("n", 97), []byte("x"), 0o600), // as long as it may be
		unix.Mknod(from+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(from+"/disk", unix.S_IFBLK|0o600, int(unix.Mkdev(300, 70000))),
		unix.Mknod(from+"/pipe", unix.S_IFIFO|0o622, 0),
		os.Chtimes(from+"/pts", time.Unix(1, 0), time.Unix(1000000000, 0)), os.Chtimes(from, time.Unix(1, 0), time.Unix(900000000, 0)))
	for what, make := range map[string]func(){
		"much":    func() {},
		"nothing": func() { must(os.RemoveAll(from), os.Mkdir(from, 0o1777), os.Chown(from, 3, 4)) },
	} {
		make()
		archive, err := a.run(t, true, "freezer", a.dir+"/freezer.state", "tar", from)
		must(err)
		dir, done := refill(t, []byte(archive))
		if !done {
			t.Errorf("%s: it was left to tar", what)
		}
		tars := t.TempDir()
		cmd := exec.Command("tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", tars)
		cmd.Stdin = strings.NewReader(archive)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got, want := treeOf(t, dir), treeOf(t, tars); got != want {
			t.Errorf("%s: it is\n%s\nand of tar\n%s", what, got, want)
		}
	}
}

// member is one of an archive as ahead.c writes it.
type member struct {
	name, target, content string
	kind                  byte
	mode                  int
	spoil                 map[int]string // the header at an offset, before it is summed up
}

func (m member) bytes() []byte {
	h := make([]byte, 512)
	copy(h[0:100], m.name)
	for _, field := range []struct{ at, digits, value int }{{100, 7, m.mode}, {108, 7, 0}, {116, 7, 0}, {124, 11, len(m.content)}, {136, 11, 0}, {329, 7, 1}, {337, 7, 3}} {
		copy(h[field.at:], fmt.Sprintf("%0*o", field.digits, field.value))
	}
	h[156] = m.kind
	copy(h[157:257], m.target)
	copy(h[257:], "ustar\x0000")
	for at, text := range m.spoil {
		copy(h[at:], text)
	}
	summed(h)
	return append(append(h, m.content...), make([]byte, (512-len(m.content)%512)%512)...)
}

// summed gives a header the sum that it is to have.
func summed(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00", sum))
}

// wrapped is what members make, as a gzip file that is not compressed.
func wrapped(tar []byte) []byte {
	out := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3}
	for at := 0; at < len(tar); {
		n := min(len(tar)-at, 65535)
		last := byte(0)
		if at+n == len(tar) {
			last = 1
		}
		out = append(binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(append(out, last), uint16(n)), ^uint16(n)), tar[at:at+n]...)
		at += n
	}
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(tar)), uint32(len(tar)))
}

func archiveOf(members ...member) []byte {
	var tar []byte
	for _, m := range members {
		tar = append(tar, m.bytes()...)
	}
	return wrapped(append(tar, make([]byte, 1024)...))
}

func TestAnArchiveThatIsNotPlainIsLeftToTar(t *testing.T) {
	file := func(name string) member { return member{name: name, kind: '0', content: "text", mode: 0o644} }
	dir := func(name string) member { return member{name: name, kind: '5', mode: 0o755} }
	top := dir("./")
	spoiled := func(at int, text string) member {
		return member{name: "./file", kind: '0', content: "text", mode: 0o644, spoil: map[int]string{at: text}}
	}
	link := func(name, target string) member { return member{name: name, target: target, kind: '2', mode: 0o777} }
	if dir, done := refill(t, archiveOf(top, file("./file"), dir("./dir/"), file("./dir/file"))); !done {
		t.Errorf("a plain one is, too: it holds %s", treeOf(t, dir))
	}
	whole := archiveOf(top, file("./file"))
	for what, archive := range map[string][]byte{
		"empty":                   {},
		"a name that leads out":   archiveOf(top, file("./../file")),
		"one that comes back":     archiveOf(top, dir("./dir/"), file("./dir/../file")),
		"an absolute name":        archiveOf(top, file("/file")),
		"an empty part":           archiveOf(top, file(".//file")),
		"a name without a dot":    archiveOf(top, file("file")),
		"no name":                 archiveOf(top, file("")),
		"a file called as dir":    archiveOf(top, file("./file/")),
		"a dir called as file":    archiveOf(top, member{name: "./dir", kind: '5'}),
		"a hard link":             archiveOf(top, member{name: "./file", target: "/etc/passwd", kind: '1'}),
		"a socket, or what":       archiveOf(top, member{name: "./file", kind: '7'}),
		"a link to nothing":       archiveOf(top, member{name: "./file", kind: '2'}),
		"a link with contents":    archiveOf(top, member{name: "./file", target: "x", kind: '2', content: "text"}),
		"more mode than there is": archiveOf(top, member{name: "./file", kind: '0', mode: 0o17777}),
		"a name twice":            archiveOf(top, file("./file"), file("./file")),
		"no directory for it":     archiveOf(top, file("./dir/file")),
		"through a link out":      archiveOf(top, link("./out", "/tmp"), file("./out/stasis-refill-test")),
		"through a link at last":  archiveOf(top, dir("./a/"), link("./b", "a"), file("./b/file")),
		"through a link":          archiveOf(top, dir("./a/"), dir("./a/c/"), link("./b", "a"), file("./b/c/file")),
		"through a link and back": archiveOf(top, link("./b", ".."), file("./b/dir/file")),
		"no end":                  wrapped(append(top.bytes(), file("./file").bytes()...)),
		"half an end":             wrapped(append(top.bytes(), make([]byte, 512)...)),
		"something after it":      append(slices.Clone(whole), 0),
		"compressed":              append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0}, make([]byte, 8)...),
		"a wrong sum":             wrapped(append(bytes.Replace(append(top.bytes(), file("./file").bytes()...), []byte("./file"), []byte("./fool"), 1), make([]byte, 1024)...)),
		"a size past the end":     archiveOf(top, spoiled(124, "00000004000")),
		"one of many digits":      archiveOf(top, spoiled(124, "77777777777")),
		"one that is no number":   archiveOf(top, spoiled(124, "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x04")),
		"one of a block too many": wrapped(append(top.bytes(), spoiled(124, "00000001000").bytes()[:512]...)),
		"a mode without an end":   archiveOf(top, spoiled(100, "00006440")),
		"no owner":                archiveOf(top, spoiled(108, "\x00")),
		"a name in two parts":     archiveOf(top, spoiled(345, "prefix")),
		"another magic":           archiveOf(top, spoiled(257, "ustar  \x00")),
		"a device of no number":   archiveOf(top, member{name: "./null", kind: '3', mode: 0o666, spoil: map[int]string{329: "x"}}),
		"too much":                archiveOf(top, member{name: "./file", kind: '0', mode: 0o644, content: strings.Repeat("x", 300<<10)}),
	} {
		dir, done := refill(t, archive)
		if done {
			t.Errorf("%s: extracted as\n%s", what, treeOf(t, dir))
		}
		if _, err := os.Lstat("/tmp/stasis-refill-test"); err == nil {
			os.Remove("/tmp/stasis-refill-test")
			t.Errorf("%s: it wrote outside", what)
		}
		if _, err := os.Lstat(filepath.Dir(dir) + "/file"); err == nil {
			t.Errorf("%s: it wrote outside", what)
		}
	}
	for length := range whole {
		if length%37 == 0 {
			if _, done := refill(t, whole[:length]); done {
				t.Errorf("the first %d of %d bytes were extracted", length, len(whole))
			}
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 { // what of it is extracted is of no matter: only that nothing else is touched
		if i%3 == 0 {
			bad := slices.Clone(whole)
			for range 1 + r.IntN(3) {
				bad[r.IntN(len(bad))] = byte(r.IntN(256))
			}
			refill(t, bad)
			continue
		}
		h := []byte(file("./file").bytes()) // behind its sum
		for range 1 + r.IntN(3) {
			h[r.IntN(512)] = []byte("\x00 07/.5\xff")[r.IntN(8)]
		}
		summed(h[:512])
		refill(t, wrapped(slices.Concat(top.bytes(), h, make([]byte, 1024))))
	}
}

func TestCRIUsTarIsReplacedOnlyForWhatIsPlain(t *testing.T) {
	library, err := cc.Compile(refillSource, "-shared", "-fPIC")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	top, link := member{name: "./", kind: '5', mode: 0o755}, member{name: "./file", target: "x", kind: '2', mode: 0o777}
	hard := member{name: "./file", target: "x", kind: '1'}
	if err := errors.Join(os.WriteFile(dir+"/library.so", library, 0o755), os.WriteFile(dir+"/tar", []byte("#!/bin/sh\necho $@\nwc -c\n"), 0o755),
		os.WriteFile(dir+"/plain", archiveOf(top, link), 0o600), os.WriteFile(dir+"/other", archiveOf(top, hard), 0o600), os.Mkdir(dir+"/into", 0o755)); err != nil {
		t.Fatal(err)
	}
	extract := []string{"--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"}
	for _, c := range []struct {
		archive string
		words   []string
		left    bool
	}{
		{"plain", append(slices.Clone(extract), dir+"/into"), false},
		{"other", append(slices.Clone(extract), dir+"/into"), true},
		{"plain", append(slices.Clone(extract), dir+"/into", "more"), true},
		{"plain", append(slices.Clone(extract), dir+"/nowhere"), true},
		{"plain", extract, true},
		{"plain", []string{"--create"}, true},
	} {
		archive, err := os.ReadFile(dir + "/" + c.archive)
		if err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(dir + "/" + c.archive)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd := exec.Command("/usr/bin/env", append([]string{"tar"}, c.words...)...)
		cmd.Env, cmd.Stdin = []string{"LD_PRELOAD=" + dir + "/library.so", "PATH=" + dir + ":/usr/bin:/bin"}, file
		out, err := cmd.CombinedOutput()
		want := ""
		if c.left { // with the archive from its beginning
			want = fmt.Sprintf("%s\n%d\n", strings.Join(c.words, " "), len(archive))
		}
		if err != nil || string(out) != want {
			t.Errorf("tar %v of the %s archive: %v: %q, want %q", c.words, c.archive, err, out, want)
		}
	}
	if target, err := os.Readlink(dir + "/into/file"); err != nil || target != "x" {
		t.Errorf("the plain archive was not extracted: %q, %v", target, err)
	}
}
