package systemlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// JournalSocket is where systemd's journal takes records in its native protocol.
const JournalSocket = "/run/systemd/journal/socket"

// sendTimeout is how long a journal that does not read is waited for, before the record is
// dropped.
const sendTimeout = time.Second

// maxFieldName is how long the name of a field may be, in bytes.
const maxFieldName = 64

// Journal returns a handler that logs to a journal which listens on a socket. It fails if
// nobody does.
func Journal(socket string, cfg Config) (*Handler, error) {
	addr := &net.UnixAddr{Name: socket, Net: "unixgram"}
	probe, err := net.DialUnix("unixgram", nil, addr)
	if err != nil {
		return nil, fmt.Errorf("connect to the journal: %w", err)
	}
	_ = probe.Close() // a journal that is restarted is a new one: each record is sent by address
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("make a socket for the journal: %w", err)
	}
	return newHandler(&journal{conn: conn, addr: addr, identifier: cfg.Identifier}, cfg), nil
}

// journal is a sink.
type journal struct {
	conn       *net.UnixConn
	addr       *net.UnixAddr
	identifier string
}

// priority is syslog's, which the journal takes over.
func priority(level slog.Level) int {
	const errorPriority, warning, info, debug = 3, 4, 6, 7
	switch {
	case level >= slog.LevelError:
		return errorPriority
	case level >= slog.LevelWarn:
		return warning
	case level >= slog.LevelInfo:
		return info
	}
	return debug
}

func (j *journal) send(level slog.Level, text string, fields map[string]string) error {
	var b bytes.Buffer
	appendField(&b, "MESSAGE", text)
	appendField(&b, "PRIORITY", strconv.Itoa(priority(level)))
	appendField(&b, "SYSLOG_IDENTIFIER", j.identifier)
	for name, value := range fields {
		appendField(&b, name, value)
	}
	if err := j.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, _, err := j.conn.WriteMsgUnix(b.Bytes(), nil, j.addr)
	if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		err = j.sendFile(b.Bytes())
	}
	if err != nil {
		return fmt.Errorf("log to the journal: %w", err)
	}
	return nil
}

// sendFile sends a record that is too large for a datagram, in a file that nobody can change
// any longer, as the protocol asks.
func (j *journal) sendFile(record []byte) error {
	fd, err := unix.MemfdCreate("journal-record", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "journal-record")
	defer f.Close()
	if _, err := f.Write(record); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	_, _, err = j.conn.WriteMsgUnix(nil, unix.UnixRights(int(f.Fd())), j.addr)
	return err
}

func (j *journal) close() error { return j.conn.Close() }

// appendField writes a field: NAME=value, or, where the value has several lines, the name on a
// line and the value behind its length.
func appendField(b *bytes.Buffer, name, value string) {
	b.WriteString(name)
	if strings.IndexByte(value, '\n') < 0 {
		b.WriteByte('=')
	} else {
		b.WriteByte('\n')
		var length [8]byte
		binary.LittleEndian.PutUint64(length[:], uint64(len(value)))
		b.Write(length[:])
	}
	b.WriteString(value)
	b.WriteByte('\n')
}

// fieldName makes a name that the journal takes: capital letters, digits and underscores, the
// first a letter. Names that have a meaning there get a prefix.
func fieldName(key string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(key))
	reserved := name == "MESSAGE" || name == "PRIORITY" || strings.HasPrefix(name, "SYSLOG_") || strings.HasPrefix(name, "CODE_")
	if reserved || name == "" || name[0] == '_' || name[0] < 'A' {
		name = "X_" + name
	}
	return name[:min(len(name), maxFieldName)]
}
