package systemlog_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/systemlog"
)

// listen plays a log: it listens on a socket in a directory of the test.
func listen(t *testing.T) (conn *net.UnixConn, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "socket")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // some tests do
	return conn, path
}

// receive receives one message, or what the file has that comes instead.
func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b, oob := make([]byte, 1<<20), make([]byte, 1024)
	n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	if len(messages) == 0 {
		return string(b[:n])
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || n != 0 {
		t.Fatalf("%d bytes with a file: %v", n, err)
	}
	f := os.NewFile(uintptr(fds[0]), "record")
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("the file is not sealed")
	}
	record, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return string(record)
}

// parse reads a record of the journal's protocol.
func parse(t *testing.T, record string) map[string]string {
	t.Helper()
	fields := make(map[string]string)
	for record != "" {
		line, rest, ok := strings.Cut(record, "\n")
		if !ok {
			t.Fatalf("no end of line in %q", record)
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			n := binary.LittleEndian.Uint64([]byte(rest))
			value, rest = rest[8:8+n], rest[8+n+1:]
		}
		if _, twice := fields[name]; twice {
			t.Errorf("%s comes twice", name)
		}
		fields[name], record = value, rest
	}
	return fields
}

func TestJournal(t *testing.T) {
	conn, path := listen(t)
	h, err := systemlog.Journal(path, systemlog.Config{
		Identifier: "prog", Level: slog.LevelDebug, Fields: map[string]string{"IMAGE": "sha256:00", "DIR": "/a b"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	log := slog.New(h)
	large := strings.Repeat("large ", 100_000)
	for _, test := range []struct {
		name string
		log  func()
		want map[string]string
	}{
		{"plain", func() { log.Info("mounted") }, map[string]string{"MESSAGE": "mounted", "PRIORITY": "6"}},
		{"debug", func() { log.Debug("m") }, map[string]string{"MESSAGE": "m", "PRIORITY": "7"}},
		{"warning", func() { log.Warn("m") }, map[string]string{"MESSAGE": "m", "PRIORITY": "4"}},
		{"error", func() { log.Error("m", "error", errors.New("broken")) }, map[string]string{"MESSAGE": "m error=broken", "PRIORITY": "3", "ERROR": "broken"}},
		{"attributes", func() { log.With("ino", 7).WithGroup("at").Info("m", "off set", 4096) }, map[string]string{
			"MESSAGE": `m ino=7 "at.off set"=4096`, "PRIORITY": "6", "INO": "7", "AT_OFF_SET": "4096",
		}},
		{"groups", func() { log.Info("m", slog.Group("g", "a", 1, slog.Group("h", "b", 2))) }, map[string]string{
			"MESSAGE": "m g.a=1 g.h.b=2", "PRIORITY": "6", "G_A": "1", "G_H_B": "2",
		}},
		{"several lines", func() { log.Info("one\ntwo", "stack", "a\nb=c\n") }, map[string]string{
			"MESSAGE": "one\ntwo stack=\"a\\nb=c\\n\"", "PRIORITY": "6", "STACK": "a\nb=c\n",
		}},
		{"over a field", func() { log.Info("m", "dir", "/other") }, map[string]string{"MESSAGE": "m dir=/other", "PRIORITY": "6", "DIR": "/other"}},
		{"names that mean something", func() { log.Info("m", "message", "x", "_uid", 0, "9", 1, "syslog_pid", 1) }, map[string]string{
			"MESSAGE": "m message=x _uid=0 9=1 syslog_pid=1", "PRIORITY": "6", "X_MESSAGE": "x", "X__UID": "0", "X_9": "1", "X_SYSLOG_PID": "1",
		}},
		{"large", func() { log.Info(large) }, map[string]string{"MESSAGE": large, "PRIORITY": "6"}},
	} {
		test.log()
		want := map[string]string{"SYSLOG_IDENTIFIER": "prog", "IMAGE": "sha256:00", "DIR": "/a b"}
		for k, v := range test.want {
			want[k] = v
		}
		if diff := cmp.Diff(want, parse(t, receive(t, conn))); diff != "" {
			t.Errorf("%s (-want +got):\n%.2000s", test.name, diff)
		}
	}
}

func TestLevel(t *testing.T) {
	conn, path := listen(t)
	h, err := systemlog.Journal(path, systemlog.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	slog.New(h).Debug("not this")
	slog.New(h).Info("this")
	if got := parse(t, receive(t, conn))["MESSAGE"]; got != "this" {
		t.Errorf("message %q", got)
	}
}

// A journal that is restarted gets what comes after, and one that is gone costs no more than
// an error.
func TestJournalRestarts(t *testing.T) {
	conn, path := listen(t)
	h, err := systemlog.Journal(path, systemlog.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := errors.Join(conn.Close(), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	record := slog.NewRecord(time.Now(), slog.LevelInfo, "m", 0)
	if err := h.Handle(t.Context(), record); err != nil {
		t.Errorf("without a journal: %v", err)
	}
	// The queue is in order: when this one is sent, the other was, in vain.
	for deadline := time.Now().Add(10 * time.Second); systemlog.Waiting(h) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it waits for a journal that is not there")
		}
	}
	again, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := h.Handle(t.Context(), record); err != nil {
		t.Error(err)
	}
	if got := parse(t, receive(t, again))["MESSAGE"]; got != "m" {
		t.Errorf("message %q", got)
	}
	if _, err := systemlog.Journal(path+"x", systemlog.Config{}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no journal at all: %v, want ENOENT", err)
	}
}

// A log that does not read costs records, and nobody's time. What was dropped is counted.
func TestFull(t *testing.T) {
	conn, path := listen(t)
	h, err := systemlog.Syslog("unixgram", path, systemlog.Config{})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(h)
	sent := 0
	record := slog.NewRecord(time.Now(), slog.LevelInfo, "m", 0)
	for err = nil; err == nil; sent++ {
		err = h.Handle(t.Context(), record)
	}
	if !errors.Is(err, systemlog.ErrFull) {
		t.Fatalf("got %v, want ErrFull", err)
	}
	if err := h.Handle(t.Context(), record); !errors.Is(err, systemlog.ErrFull) {
		t.Fatalf("got %v, want ErrFull again", err)
	}
	if err := h.Close(); !errors.Is(err, systemlog.ErrFull) {
		t.Errorf("closed: %v, want ErrFull", err)
	}
	log.Info("after the end") // is lost

	h, err = systemlog.Syslog("unixgram", path, systemlog.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil; {
		err = h.Handle(t.Context(), record)
	}
	got := ""
	for n := 0; !strings.Contains(got, "dropped"); n++ {
		if systemlog.Waiting(h) < 100 {
			_ = h.Handle(t.Context(), record) // brings the count along
		}
		got = receive(t, conn)
	}
	if !strings.Contains(got, ": 1 messages were dropped: the log was too slow") {
		t.Errorf("got %q", got)
	}
	go func() {
		for {
			if _, err := conn.Read(make([]byte, 1024)); err != nil {
				return
			}
		}
	}()
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

func TestSyslog(t *testing.T) {
	conn, path := listen(t)
	h, err := systemlog.Syslog("unixgram", path, systemlog.Config{Identifier: "prog", Level: slog.LevelDebug, Fields: map[string]string{"IMAGE": "x"}})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	log := slog.New(h)
	const daemon = 3 << 3
	for level, priority := range map[slog.Level]int{slog.LevelDebug: 7, slog.LevelInfo: 6, slog.LevelWarn: 4, slog.LevelError: 3} {
		log.Log(t.Context(), level, "cannot read", "ino", 7)
		want := fmt.Sprintf(`^<%d>.* prog\[%d\]: cannot read ino=7\n$`, daemon|priority, os.Getpid())
		if got := receive(t, conn); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("%v: got %q, want %s", level, got, want)
		}
	}
	if _, err := systemlog.Syslog("unixgram", path+"x", systemlog.Config{}); err == nil {
		t.Error("no syslog: no error")
	}
}
