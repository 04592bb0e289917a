package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What the init pipe is told.
const (
	toldSuccess = 's'
	toldFailure = 'f'
)

// failurePatience is how long a mount that failed waits for somebody to be told so.
const failurePatience = 10 * time.Second

// initPipe is the named pipe of --init-pipe. A nil one tells nobody.
type initPipe struct {
	name string
	path string // of what was opened, whatever has the name by now
	fd   int
	told bool
}

// openInitPipe opens a named pipe without waiting for a reader.
func openInitPipe(name string) (*initPipe, error) {
	if name == "" {
		return nil, nil //nolint:nilnil // nobody is to be told
	}
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("open init pipe %s: %w: make it with mkfifo", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open init pipe %s: %w", name, err)
	}
	p := &initPipe{name: name, path: fmt.Sprintf("/proc/self/fd/%d", fd), fd: fd}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
		err = errors.New("it is no named pipe: make one with mkfifo")
	}
	if err == nil {
		err = unix.Access(p.path, unix.W_OK)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("open init pipe %s: %w", name, err)
	}
	return p, nil
}

func (p *initPipe) close() {
	if p != nil {
		_ = unix.Close(p.fd) // nothing was written by it
	}
}

// tell writes one byte to the pipe, once there is a reader, but only the first time that it is
// called. When ctx is done it gives up, having tried once.
func (p *initPipe) tell(ctx context.Context, what byte) error {
	if p == nil || p.told {
		return nil
	}
	p.told = true
	if err := p.write(ctx, what); err != nil {
		return fmt.Errorf("write to init pipe %s: %w", p.name, err)
	}
	return nil
}

func (p *initPipe) write(ctx context.Context, what byte) error {
	fd, err := unix.Open(p.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENXIO) && ctx.Err() == nil {
		fd, err = p.await(ctx)
	}
	if errors.Is(err, unix.ENXIO) {
		return errors.New("nobody reads it")
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p.name)
	_, err = f.Write([]byte{what})
	return errors.Join(err, f.Close())
}

// await opens the pipe once there is a reader.
func (p *initPipe) await(ctx context.Context) (int, error) {
	type opened struct {
		fd  int
		err error
	}
	done := make(chan opened, 1)
	go func() {
		for {
			fd, err := unix.Open(p.path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if !errors.Is(err, unix.EINTR) {
				done <- opened{fd, err}
				return
			}
		}
	}()
	select {
	case o := <-done:
		return o.fd, o.err
	case <-ctx.Done():
	}
	// A reader of our own lets the open return.
	reader, err := unix.Open(p.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(reader)
	o := <-done
	if o.err == nil {
		_ = unix.Close(o.fd)
	}
	return -1, unix.ENXIO
}

// tellFailure tells that a mount failed, and waits some time for a reader. When ctx is done it
// does not wait.
func (p *initPipe) tellFailure(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, failurePatience)
	defer cancel()
	return p.tell(ctx, toldFailure)
}
