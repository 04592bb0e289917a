// Command pause holds the namespaces of a pod in the clusters of the end-to-end suite: it does
// nothing until it is told to end. Where the containers of a pod share its processes it is their
// init, and reaps those that nobody else waits for.
package main

import (
	"errors"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGCHLD)
	reap() // what ended before
	for s := range signals {
		if s != unix.SIGCHLD {
			return
		}
		reap()
	}
}

// reap takes the status of every child that has ended: several may have for one signal.
func reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return // no children, or none that has ended
		}
	}
}
