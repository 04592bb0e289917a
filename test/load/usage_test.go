package load_test

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// usage is what a driver's process holds.
type usage struct {
	fds, goroutines, threads int
	resident                 int64 // bytes
}

// String implements fmt.Stringer.
func (u usage) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, %d threads, %.1f MB resident", u.fds, u.goroutines, u.threads, float64(u.resident)/1e6)
}

// measure reads what the kernel and the driver's metrics say.
func measure(t *testing.T, pid int, address string) usage {
	t.Helper()
	u, err := readUsage(t.Context(), pid, address)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func readUsage(ctx context.Context, pid int, address string) (usage, error) {
	var u usage
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return u, err
	}
	u.fds = len(fds)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return u, err
	}
	u.threads = len(threads)
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return u, err
	}
	pages, err := strconv.ParseInt(strings.Fields(string(statm))[1], 10, 64)
	if err != nil {
		return u, err
	}
	u.resident = pages * int64(os.Getpagesize())
	u.goroutines, err = goroutines(ctx, address)
	return u, err
}

// goroutines reads go_goroutines from the driver's metrics.
func goroutines(ctx context.Context, address string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	// A connection that is kept would itself be a descriptor and some goroutines.
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			return strconv.Atoi(value)
		}
	}
	return 0, fmt.Errorf("the metrics have no go_goroutines: %w", lines.Err())
}

// sample measures once a second until the returned function is called.
func sample(t *testing.T, pid int, address string) (stop func() []usage) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan []usage)
	go func() {
		var all []usage
		defer func() { done <- all }()
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if u, err := readUsage(ctx, pid, address); err == nil {
					all = append(all, u)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() []usage {
		cancel()
		return <-done
	}
}

// waitFor gives what ends by itself, as idle connections do, some time to end.
func waitFor(t *testing.T, pid int, address string, before usage) usage {
	t.Helper()
	var u usage
	for range 100 {
		u = measure(t, pid, address)
		if u.fds <= before.fds && u.goroutines <= before.goroutines {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return u
}

// checkLeaks compares an idle driver with itself before.
func checkLeaks(t *testing.T, before, after usage) {
	t.Helper()
	// The runtime may open a descriptor of its own late; a leak would be one a volume or a round.
	const slack = 5
	if after.fds > before.fds+slack {
		t.Errorf("%d descriptors are open, %d were before", after.fds, before.fds)
	}
	if after.goroutines > before.goroutines+slack {
		t.Errorf("%d goroutines run, %d did before", after.goroutines, before.goroutines)
	}
}

// checkMemory fails if the driver uses more memory late than early: the median of the last
// quarter of the samples against that of the second.
func checkMemory(t *testing.T, samples []usage) {
	t.Helper()
	const fewest = 12
	if len(samples) < fewest {
		t.Logf("%d samples are too few to tell whether memory grows: give -load.duration more than %d s", len(samples), fewest)
		return
	}
	quarter := len(samples) / 4
	early, late := median(samples[quarter:2*quarter]), median(samples[len(samples)-quarter:])
	t.Logf("memory while busy: %.1f MB in the second quarter, %.1f MB in the last (medians)", float64(early)/1e6, float64(late)/1e6)
	// The garbage collector lets the heap breathe.
	if late > early+early/5+16<<20 {
		t.Errorf("memory grew from %d to %d bytes", early, late)
	}
}

// median returns the median of the resident memory.
func median(samples []usage) int64 {
	all := make([]int64, len(samples))
	for i, u := range samples {
		all[i] = u.resident
	}
	slices.Sort(all)
	return all[len(all)/2]
}
