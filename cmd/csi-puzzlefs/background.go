package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/systemlog"
)

// A process of Go cannot fork. To mount in the background, the program starts itself again, with
// the same arguments: the parent waits until the child, the server, has mounted or failed.
//
//	parent                                         server
//	  starts the server ------------------------->   descriptor 3: a pipe, named by serverVar
//	  copies to its own stderr <------------------   descriptor 2: warnings, the error
//	                                                 mounts
//	  reads a byte, and ends <--------------------   writes toldSuccess to descriptor 3
//	  or reads the end of the file, and ends as
//	  the server did
//
// When the byte is written the server's stderr is /dev/null already. A parent that is gone by
// then lets the write fail, and the server unmount.

// serverVar tells a process that it is a server: by the device and the inode of the pipe that is
// its descriptor 3. Whoever sets it by accident does not have that pipe.
const serverVar = "CSI_PUZZLEFS_MOUNT_SERVER"

// serverFD is the descriptor of that pipe.
const serverFD = 3

// pipeName identifies a pipe.
func pipeName(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return "", errors.New("not a pipe")
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino), nil
}

// server is this process, where it was started to serve in the background.
type server struct {
	parent *os.File
	log    *systemlog.Handler // nil if there is none
	stderr io.Writer
}

// asServer returns nil where this process was not started as a server.
func asServer(stderr io.Writer) *server {
	want, ok := os.LookupEnv(serverVar)
	if !ok {
		return nil
	}
	_ = os.Unsetenv(serverVar) // not for processes that this one starts
	if name, err := pipeName(serverFD); err != nil || name != want {
		return nil
	}
	unix.CloseOnExec(serverFD)
	// A parent that is gone must not end the server before it has cleaned up.
	signal.Ignore(unix.SIGPIPE)
	// Starting by way of /proc gave it another name.
	_ = os.WriteFile("/proc/self/comm", []byte("csi-puzzlefs"), 0o600)
	return &server{parent: os.NewFile(serverFD, "parent"), stderr: stderr}
}

// openLog lets everything be logged where a server can log to.
func (s *server) openLog(levelName string, fields map[string]string) {
	var level slog.Level
	_ = level.UnmarshalText([]byte(levelName)) // the root command has accepted it
	h, err := systemlog.Open(systemlog.Config{Identifier: "csi-puzzlefs", Level: level, Fields: fields})
	if err != nil {
		slog.SetDefault(slog.New(slog.DiscardHandler)) // ready says so
		return
	}
	s.log = h
	slog.SetDefault(slog.New(h))
}

// closeLog waits until all is logged.
func (s *server) closeLog() {
	if s.log != nil {
		_ = s.log.Close() // where would one say so?
	}
}

// ready lets the parent end. It fails if the parent is gone: then nobody knows of the server.
func (s *server) ready() error {
	if s.log == nil {
		fmt.Fprintf(s.stderr, "csi-puzzlefs: warning: %v: messages of the server go nowhere; mount with --foreground to see them\n", systemlog.ErrNone)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	defer unix.Close(null)
	if err := unix.Dup3(null, unix.Stderr, 0); err != nil {
		return fmt.Errorf("let go of stderr: %w", err)
	}
	if _, err := s.parent.Write([]byte{toldSuccess}); err != nil {
		return fmt.Errorf("tell the parent that the image is mounted: %w", err)
	}
	return s.parent.Close()
}

// reportedError says that somebody else has said on stderr what went wrong.
type reportedError struct{ code int }

func (e *reportedError) Error() string { return fmt.Sprintf("failed with exit code %d", e.code) }

// startServer starts a server and returns when it has mounted, or failed and ended.
func startServer(ctx context.Context, stderr io.Writer) error {
	status, serverStatus, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer status.Close()
	defer serverStatus.Close()
	messages, serverStderr, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer messages.Close()
	defer serverStderr.Close()
	name, err := pipeName(int(serverStatus.Fd()))
	if err != nil {
		return fmt.Errorf("name a pipe: %w", err)
	}
	if err := closeOnExec(); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), serverVar+"="+name)
	cmd.ExtraFiles = []*os.File{serverStatus} // the first becomes serverFD
	cmd.Stderr = serverStderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	// Else their ends would not be seen.
	_ = serverStatus.Close()
	_ = serverStderr.Close()
	return awaitServer(ctx, cmd, status, messages, stderr)
}

// endPatience is how long a server may take to clean up and end, before it is killed: it may
// hang in a system call.
const endPatience = 3 * time.Second

// closeOnExec keeps from the server what this process was given besides its standard streams,
// such as a lock, which would be held for as long as the image is mounted.
func closeOnExec() error {
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open files: %w", err)
	}
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > unix.Stderr {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// awaitServer waits until a server has mounted or ended. When ctx is done it ends the server,
// which cleans up, and waits for that.
func awaitServer(ctx context.Context, cmd *exec.Cmd, status, messages io.Reader, stderr io.Writer) error {
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(stderr, messages) // until the server ends or lets go of it
	}()
	mounted := make(chan bool, 1)
	go func() {
		var b [1]byte
		_, err := io.ReadFull(status, b[:])
		mounted <- err == nil && b[0] == toldSuccess
	}()
	interrupted := false
	ok := false
	select {
	case ok = <-mounted:
	case <-ctx.Done():
		interrupted = true
		_ = cmd.Process.Signal(unix.SIGTERM) // if it has not ended yet
		kill := time.AfterFunc(endPatience, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		<-mounted
	}
	if ok {
		<-copied
		return cmd.Process.Release()
	}
	err := cmd.Wait()
	<-copied
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		return &reportedError{exit.ExitCode()}
	case errors.As(err, &exit) && interrupted:
		return fmt.Errorf("%w: %w", errKilled, ctx.Err())
	case errors.As(err, &exit):
		return fmt.Errorf("%w: %w", errKilled, exit)
	case interrupted:
		return ctx.Err()
	}
	return errors.Join(err, errors.New("the server ended before the image was mounted"))
}

// errKilled says that a server could not clean up.
var errKilled = errors.New("the server was killed before the image was mounted")
