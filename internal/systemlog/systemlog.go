// Package systemlog is where a program logs that has no terminal: systemd's journal, with
// every attribute as a field, or else syslog.
package systemlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// ErrNone says that there is neither a journal nor a syslog.
var ErrNone = errors.New("there is neither systemd's journal nor syslog")

// Config says how to log.
type Config struct {
	// Identifier names the program.
	Identifier string
	// Level is the lowest that is logged; slog.LevelInfo if nil.
	Level slog.Leveler
	// Fields go to the journal with every record, and are not part of the text. Their names
	// have capital letters, digits and underscores.
	Fields map[string]string
}

// Open returns a handler that logs to the journal of this machine, or to its syslog if it has
// none. It fails with ErrNone.
func Open(cfg Config) (*Handler, error) {
	h, err := Journal(JournalSocket, cfg)
	if err == nil {
		return h, nil
	}
	h, syslogErr := Syslog("", "", cfg)
	if syslogErr == nil {
		return h, nil
	}
	return nil, fmt.Errorf("%w: %w; %w", ErrNone, err, syslogErr)
}

// sink takes records.
type sink interface {
	// send sends one record. It does not keep the fields.
	send(level slog.Level, text string, fields map[string]string) error
	close() error
}

const (
	// queueLen is how many records wait for a log that is slow to take them. What comes when as
	// many wait is dropped, and counted: whoever logs may be answering a reader.
	queueLen = 1024
	// closePatience is how long Close waits for the log to take what is left.
	closePatience = 2 * time.Second
)

// ErrFull says that a record was dropped because the log is too slow.
var ErrFull = errors.New("too many messages wait for the log")

// Handler is a slog.Handler that sends each record as one message: the record's own, and its
// attributes behind it as slog.TextHandler writes them. It never waits for the log. It is safe
// for concurrent use.
type Handler struct {
	shared *shared
	cfg    *Config
	text   slog.Handler // writes to shared.buf
	group  string       // with an underscore behind each name
	fields []field      // of WithAttrs
}

var _ slog.Handler = (*Handler)(nil)

// shared is what a handler shares with those derived from it.
type shared struct {
	mu      sync.Mutex // guards buf, dropped and closed
	buf     bytes.Buffer
	dropped int
	closed  bool

	queue chan message
	sink  sink
	ended chan struct{} // closed when everything in the queue was sent
}

// message is a record that waits to be sent.
type message struct {
	level  slog.Level
	text   string
	fields map[string]string
}

// enqueue adds a message to the queue; mu is held.
func (s *shared) enqueue(m message) error {
	if s.closed {
		return net.ErrClosed
	}
	if s.dropped > 0 {
		select {
		case s.queue <- message{slog.LevelWarn, fmt.Sprintf("%d messages were dropped: the log was too slow", s.dropped), m.fields}:
			s.dropped = 0
		default:
		}
	}
	select {
	case s.queue <- m:
		return nil
	default:
		s.dropped++
		return ErrFull
	}
}

// run sends what is in the queue until that is closed.
func (s *shared) run() {
	defer close(s.ended)
	for m := range s.queue {
		_ = s.sink.send(m.level, m.text, m.fields) // where would one say so?
	}
}

type field struct{ name, value string }

func newHandler(s sink, cfg Config) *Handler {
	if cfg.Level == nil {
		cfg.Level = slog.LevelInfo
	}
	h := &Handler{shared: &shared{sink: s, queue: make(chan message, queueLen), ended: make(chan struct{})}, cfg: &cfg}
	go h.shared.run()
	h.text = slog.NewTextHandler(&h.shared.buf, &slog.HandlerOptions{
		Level: cfg.Level,
		// The message stands before the attributes without a key; the rest the log knows.
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{}
			}
			return a
		},
	})
	return h
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.cfg.Level.Level()
}

// Handle implements slog.Handler. It fails with ErrFull if the record is dropped.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	fields := make(map[string]string, len(h.cfg.Fields)+len(h.fields)+r.NumAttrs())
	for name, value := range h.cfg.Fields {
		fields[name] = value
	}
	for _, f := range h.fields {
		fields[f.name] = f.value
	}
	r.Attrs(func(a slog.Attr) bool {
		for _, f := range flatten(h.group, a) {
			fields[f.name] = f.value
		}
		return true
	})
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	h.shared.buf.Reset()
	if err := h.text.Handle(ctx, r); err != nil {
		return err
	}
	text := r.Message
	if attrs := bytes.TrimSpace(h.shared.buf.Bytes()); len(attrs) > 0 {
		text += " " + string(attrs)
	}
	return h.shared.enqueue(message{r.Level, text, fields})
}

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	derived := *h
	derived.text = h.text.WithAttrs(attrs)
	derived.fields = append([]field(nil), h.fields...)
	for _, a := range attrs {
		derived.fields = append(derived.fields, flatten(h.group, a)...)
	}
	return &derived
}

// WithGroup implements slog.Handler.
func (h *Handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	derived := *h
	derived.text = h.text.WithGroup(name)
	derived.group = h.group + name + "_"
	return &derived
}

// Close sends what waits, if the log takes it in time, and ends the connection, for derived
// handlers, too.
func (h *Handler) Close() error {
	h.shared.mu.Lock()
	if !h.shared.closed {
		h.shared.closed = true
		close(h.shared.queue)
	}
	h.shared.mu.Unlock()
	select {
	case <-h.shared.ended:
		return h.shared.sink.close()
	case <-time.After(closePatience):
		// Closing would wait, too.
		return ErrFull
	}
}

// flatten makes fields of an attribute: one, or those of a group.
func flatten(prefix string, a slog.Attr) []field {
	value := a.Value.Resolve()
	if value.Kind() != slog.KindGroup {
		return []field{{fieldName(prefix + a.Key), value.String()}}
	}
	if a.Key != "" {
		prefix += a.Key + "_"
	}
	var fields []field
	for _, inner := range value.Group() {
		fields = append(fields, flatten(prefix, inner)...)
	}
	return fields
}
