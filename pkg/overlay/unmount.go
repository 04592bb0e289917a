package overlay

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// Unmount takes the overlay off its directory, and leaves the directories, and the tree on the
// lower one, as they are. With lazy set it does so though it is in use: whoever uses it goes
// on. Without, it fails with ErrBusy. It fails with ErrForeign if the overlay was not made by
// this package; that it is unmounted already is fine.
func (o *Overlay) Unmount(lazy bool) error {
	if !o.Ours() {
		return fmt.Errorf("unmount %s: %w: use umount(8)", o.Dir, ErrForeign)
	}
	mounted, err := o.mounted()
	if err != nil {
		return fmt.Errorf("unmount %s: %w", o.Dir, err)
	}
	if !mounted {
		return nil
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err = unix.Unmount(o.Dir, flags)
	switch {
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("%w: fuser -vm %s shows by whom; a lazy unmount does not wait for them", ErrBusy, o.Dir)
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: only root can unmount an overlay", err)
	case errors.Is(err, unix.EINVAL): // somebody else was faster
		err = nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", o.Dir, err)
	}
	return nil
}

// mounted reports whether the overlay is what is seen on its directory.
func (o *Overlay) mounted() (bool, error) {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return false, err
	}
	stack := table.At(o.Dir)
	for i, m := range stack {
		if m.Type == fsType && m.Device == o.device {
			if i > 0 {
				return false, fmt.Errorf("another file system (%s, type %s) lies on top: unmount that first", stack[0].Source, stack[0].Type)
			}
			return true, nil
		}
	}
	return false, nil
}

// Wait returns when the overlay is mounted on its directory no longer, by whomever it was
// unmounted, or when ctx is done, with the error of that.
func (o *Overlay) Wait(ctx context.Context) error {
	// Opened before the table is read, so that no change is missed: it counts them from here.
	fd, err := unix.Open(mountinfo.Self, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch the table of mounts: %w", err)
	}
	defer unix.Close(fd)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch the table of mounts: %w", err)
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // adding to zero never fails
	})
	defer func() {
		if !stop() {
			<-woken // before the descriptor is closed
		}
	}()
	for ctx.Err() == nil {
		table, err := mountinfo.Read(mountinfo.Self)
		if err != nil {
			return err
		}
		if !o.in(table) {
			return nil
		}
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch the table of mounts: %w", err)
		}
	}
	return ctx.Err()
}

// in reports whether the overlay is mounted on its directory, be it below something else.
func (o *Overlay) in(table mountinfo.Table) bool {
	for _, m := range table.At(o.Dir) {
		if m.Type == fsType && m.Device == o.device {
			return true
		}
	}
	return false
}
