package main

import (
	"io"
	"os"
	"sync"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// meter shows at a terminal how far long work is. Anywhere else it shows nothing.
type meter struct {
	bar *progressbar.ProgressBar // nil: show nothing

	mu    sync.Mutex // guards total, and keeps the bar's two calls together
	total int64
}

// newMeter returns a meter of bytes. Its methods may be called from several goroutines.
func newMeter(w io.Writer, what string) *meter {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return &meter{}
	}
	return &meter{bar: progressbar.NewOptions64(-1,
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWriter(f),
		progressbar.OptionShowBytes(true),
		progressbar.OptionShowCount(),
		progressbar.OptionThrottle(100_000_000), // nanoseconds
		progressbar.OptionClearOnFinish(),
		progressbar.OptionFullWidth(),
	)}
}

// set shows done of total bytes; a total of 0 is one that is not known.
func (m *meter) set(done, total int64) {
	if m.bar == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if total > 0 && total != m.total {
		m.total = total
		m.bar.ChangeMax64(total)
	}
	_ = m.bar.Set64(done) // a terminal that cannot be written to is no reason to stop
}

// close removes the meter from the terminal.
func (m *meter) close() {
	if m.bar != nil {
		_ = m.bar.Finish()
	}
}
