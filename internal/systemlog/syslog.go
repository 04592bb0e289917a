package systemlog

import (
	"fmt"
	"log/slog"
	"log/syslog"
)

// Syslog returns a handler that logs to a syslog daemon at an address, or to that of this
// machine if network is "". It fails if there is none.
func Syslog(network, address string, cfg Config) (*Handler, error) {
	w, err := syslog.Dial(network, address, syslog.LOG_DAEMON|syslog.LOG_INFO, cfg.Identifier)
	if err != nil {
		return nil, fmt.Errorf("connect to syslog: %w", err)
	}
	return newHandler(&daemon{w}, cfg), nil
}

// daemon is a sink.
type daemon struct{ w *syslog.Writer }

// send sends the text, which has the attributes. Syslog knows no fields.
func (d *daemon) send(level slog.Level, text string, _ map[string]string) error {
	write := d.w.Debug
	switch {
	case level >= slog.LevelError:
		write = d.w.Err
	case level >= slog.LevelWarn:
		write = d.w.Warning
	case level >= slog.LevelInfo:
		write = d.w.Info
	}
	if err := write(text); err != nil {
		return fmt.Errorf("log to syslog: %w", err)
	}
	return nil
}

func (d *daemon) close() error { return d.w.Close() }
