package builder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// lookBatch is how many names of a directory are looked at by one task.
	lookBatch = 1024
	// soonBatch is how many subdirectories are given to the look-ahead at a time.
	soonBatch = 64
	// listBuffer is how much of a directory is read at a time, in bytes.
	listBuffer = 32 << 10
)

// listing is what is known of the names in a directory.
type listing struct {
	listed  bool
	sorted  []string
	listErr error

	// at is the name that stat is asked for next, unless some are passed over.
	at int
	// looked is what was found of the names from first on, next makes what comes behind.
	first  int
	looked []looked
	next   *lookTask

	// entering are the subdirectories that are entered next, later those that come then.
	entering []*enterTask
	later    []child
}

// looked is what was found at a name.
type looked struct {
	attr
	err error
}

// lookTask looks at names.
type lookTask struct {
	*task
	looked []looked
}

// enterTask opens a subdirectory, lists it and looks at the first names.
type enterTask struct {
	*task
	name string
	dir  *hostDir
	err  error
}

func (d *hostDir) names() ([]string, error) {
	if !d.listed {
		d.list()
	}
	return d.sorted, d.listErr
}

func (d *hostDir) list() {
	d.listed = true
	if d.sorted, d.listErr = readNames(d.fd); d.listErr != nil {
		d.listErr = &os.PathError{Op: "list directory", Path: d.path(), Err: d.listErr}
	}
}

// readNames returns the names in a directory, in byte order.
func readNames(fd int) ([]string, error) {
	var all bytes.Buffer // the names, each with a NUL behind it
	count := 0
	for buf := make([]byte, listBuffer); ; {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		for b := buf[:n]; len(b) > 0; {
			var name []byte
			if name, b = cutDirent(b); len(name) > 0 {
				all.Write(name)
				all.WriteByte(0)
				count++
			}
		}
	}
	// All names are in one string.
	names := make([]string, 0, count)
	for text := all.String(); len(text) > 0; {
		i := strings.IndexByte(text, 0)
		names, text = append(names, text[:i]), text[i+1:]
	}
	slices.Sort(names)
	return names, nil
}

// cutDirent splits the first entry off what getdents64(2) returned:
//
//	inode number (8 bytes)  offset (8)  length of the entry (2)  type (1)  name, NUL
//
// The name is empty where the entry stands for none.
func cutDirent(b []byte) (name, rest []byte) {
	entry, rest := b[:binary.NativeEndian.Uint16(b[16:])], b[binary.NativeEndian.Uint16(b[16:]):]
	name, _, _ = bytes.Cut(entry[19:], []byte{0})
	if binary.NativeEndian.Uint64(entry) == 0 || string(name) == "." || string(name) == ".." {
		return nil, rest
	}
	return name, rest
}

func (d *hostDir) stat(name string) (attr, error) {
	if d.ahead == nil {
		return d.look(name)
	}
	for d.at < len(d.sorted) && d.sorted[d.at] != name {
		d.at++
	}
	if d.at == len(d.sorted) {
		return d.look(name) // it was asked for out of order
	}
	for d.at >= d.first+len(d.looked) {
		d.lookOn()
	}
	l := &d.looked[d.at-d.first]
	d.at++
	return l.attr, l.err
}

// lookOn goes on to the next names that are looked at.
func (d *hostDir) lookOn() {
	d.first += len(d.looked)
	if d.next == nil {
		d.looked = d.lookAt(d.first)
	} else {
		d.ahead.take(d.next.task)
		d.looked, d.next = d.next.looked, nil
	}
	if from := d.first + len(d.looked); from < len(d.sorted) {
		t := new(lookTask)
		t.task = newTask(func() { t.looked = d.lookAt(from) })
		d.next = t
		d.ahead.push(t.task)
	}
}

// lookAt looks at the names from one on.
func (d *hostDir) lookAt(from int) []looked {
	found := make([]looked, min(lookBatch, len(d.sorted)-from))
	for i := range found {
		found[i].attr, found[i].err = d.look(d.sorted[from+i])
	}
	return found
}

func (d *hostDir) soon(dirs []child) {
	if d.ahead == nil {
		return
	}
	d.later = dirs
	d.enterOn()
}

// enterOn gives the next subdirectories to the look-ahead.
func (d *hostDir) enterOn() {
	batch := d.later[:min(soonBatch, len(d.later))]
	d.later = d.later[len(batch):]
	tasks := make([]*task, 0, len(batch))
	for i := range batch {
		c := &batch[i]
		if c.mount {
			continue
		}
		t := &enterTask{name: c.name}
		t.task = newTask(func() {
			if t.dir, t.err = d.enterNow(t.name, &c.attr); t.err != nil {
				return
			}
			t.dir.list()
			t.dir.looked = t.dir.lookAt(0)
		})
		d.entering = append(d.entering, t)
		tasks = append(tasks, t.task)
	}
	d.ahead.push(tasks...)
}

func (d *hostDir) enter(name string, a *attr) (directory, error) {
	if len(d.entering) == 0 || d.entering[0].name != name {
		return d.enterNow(name, a)
	}
	t := d.entering[0]
	if d.entering = d.entering[1:]; len(d.entering) == 0 && len(d.later) > 0 {
		d.enterOn()
	}
	d.ahead.take(t.task)
	return t.dir, t.err
}

// forget waits for what is done ahead below the directory, and releases it.
func (d *hostDir) forget() error {
	if d.next != nil {
		d.ahead.cancel(d.next.task)
	}
	var errs []error
	for _, t := range d.entering {
		if !d.ahead.cancel(t.task) && t.dir != nil {
			errs = append(errs, t.dir.close())
		}
	}
	d.next, d.entering = nil, nil
	return errors.Join(errs...)
}
