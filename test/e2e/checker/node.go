package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"golang.org/x/sys/unix"
)

// mountLine is a mount as it is printed.
type mountLine struct {
	ID      int    `json:"id"`
	Parent  int    `json:"parent"`
	Device  string `json:"device"` // MAJOR:MINOR, the same for all binds of one mount
	Root    string `json:"root"`
	Point   string `json:"mountpoint"`
	Type    string `json:"fstype"`
	Source  string `json:"source"`
	Options string `json:"options"` // the mount's own, by commas
	Super   string `json:"superOptions"`
}

func listMounts(c *call) error {
	fsType := c.flags.String("type", "", "only file systems of this `type`, such as fuse.puzzlefs")
	under := c.flags.String("under", "", "only mount points that are this `directory` or below it")
	pid := c.flags.Int("pid", 1, "whose table: that of the mount namespace of this `process`")
	if _, err := c.parse(); err != nil {
		return err
	}
	if *under != "" && !filepath.IsAbs(*under) {
		return usageError{fmt.Errorf("--under is %q: want an absolute path, as mount points are", *under)}
	}
	table, err := mountinfo.Read(fmt.Sprintf("/proc/%d/mountinfo", *pid))
	if err != nil {
		return err
	}
	lines := make([]mountLine, 0, len(table))
	for _, m := range table {
		if *fsType != "" && m.Type != *fsType || *under != "" && !isUnder(m.Point, *under) {
			continue
		}
		lines = append(lines, mountLine{
			ID: m.ID, Parent: m.Parent, Device: string(m.Device), Root: m.Root, Point: m.Point, Type: m.Type, Source: m.Source,
			Options: strings.Join(m.Options, ","), Super: strings.Join(m.SuperOptions, ","),
		})
	}
	enc := json.NewEncoder(c.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(lines)
}

// isUnder reports whether an absolute path is dir or below it.
func isUnder(path, dir string) bool {
	dir = filepath.Clean(dir)
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func killProcesses(c *call) error {
	cmdline := c.flags.String("cmdline", "", `the program's name and arguments that it must have been given, by spaces: "csi-puzzlefs driver"`)
	text := c.flags.String("signal", "KILL", "which `signal`, by name or number; 0 sends none")
	if _, err := c.parse(); err != nil {
		return err
	}
	words := strings.Fields(*cmdline)
	if len(words) == 0 {
		return usageError{errors.New("--cmdline is empty: want the name of a program")}
	}
	signal, err := parseSignal(*text)
	if err != nil {
		return usageError{err}
	}
	pids, err := findProcesses("/proc", words)
	if err != nil {
		return err
	}
	killed := 0
	for _, pid := range pids {
		if pid == os.Getpid() {
			continue
		}
		err := unix.Kill(pid, signal)
		if errors.Is(err, unix.ESRCH) {
			continue // it ended meanwhile
		}
		if err != nil {
			return fmt.Errorf("send SIG%s to process %d: %w", strings.TrimPrefix(*text, "SIG"), pid, err)
		}
		fmt.Fprintln(c.stdout, pid)
		killed++
	}
	if killed == 0 {
		return fmt.Errorf("no process has the command line %q", *cmdline)
	}
	return nil
}

// parseSignal parses the name of a signal, with or without SIG, or its number.
func parseSignal(text string) (unix.Signal, error) {
	if n, err := strconv.ParseUint(text, 10, 6); err == nil {
		return unix.Signal(n), nil
	}
	if s := unix.SignalNum("SIG" + strings.TrimPrefix(text, "SIG")); s != 0 {
		return s, nil
	}
	return 0, fmt.Errorf("--signal is %q: want a name such as TERM, or a number", text)
}

// findProcesses returns the processes in /proc whose program has the name of the first word, in
// whatever directory, and whose arguments include all the others. Only its command line is read of a
// process: other files there hang with a process that hangs.
func findProcesses(proc string, words []string) ([]int, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue // no process
		}
		line, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		if matches(line, words) {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// matches reports whether a command line, in the kernel's form, is that of words.
func matches(line []byte, words []string) bool {
	args := strings.Split(string(bytes.TrimSuffix(line, []byte{0})), "\x00")
	if args[0] == "" || filepath.Base(args[0]) != words[0] {
		return false
	}
	for _, word := range words[1:] {
		if !slices.Contains(args[1:], word) {
			return false
		}
	}
	return true
}
