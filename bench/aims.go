package main

import (
	"fmt"
	"strings"
)

// aim is what the project wants a figure of ours to be, held against another of the same run or against a
// number.
type aim struct {
	text string
	// ours and other are measurements with their contenders.
	ours, other place
	// want is the ratio of other to ours that is wanted (of ours to other where more is better), or the figure
	// itself where there is no other. Where less is better such a figure is an upper bound.
	want float64
}

// place names a figure: of a measurement and of a contender.
type place struct{ measurement, contender string }

// Contenders that aims speak of.
const (
	oursZstd  = oursPrefix + ", zstd"
	reference = "reference"
	directory = "directory"
	squash    = "squashfs"
)

func aims(trees []tree) []aim {
	root, many := trees[0].name, trees[3].name
	against := func(text, measurement, ours, other string, want float64) aim {
		return aim{text, place{measurement, ours}, place{measurement, other}, want}
	}
	figure := func(text, measurement, ours string, want float64) aim {
		return aim{text, place{measurement, ours}, place{}, want}
	}
	again := func(kind, ours string) aim {
		return aim{
			"build again, " + kind + ", of " + ours + ", at least 20 times faster than the first",
			place{"build again, " + kind + ", " + root, ours},
			place{"build, " + root, ours},
			20,
		}
	}
	return []aim{
		against("build at least 3 times faster than the reference's", "build, "+root, oursPrefix, reference, 3),
		against("build with zstd faster than mksquashfs with zstd at level 3", "build, "+root, oursZstd, squash, 1),
		again(onePlace, oursPrefix), again(onePlace, oursZstd), again(allOver, oursPrefix), again(allOver, oursZstd),
		figure("a build takes at most 200 MiB of memory", "memory of a build, "+root, oursPrefix, 200<<20),
		figure("a build with zstd takes at most 200 MiB of memory", "memory of a build, "+root, oursZstd, 200<<20),
		figure("first stat at most 10 ms after the start of the mount", "mount to first stat, "+many, oursPrefix, 0.010),
		against("`ls -lR` cold at most twice as long as of the directory", "ls -lR cold, "+root, oursPrefix, directory, 1.0/2),
		against("`ls -lR` warm at most 1.5 times as long as of the directory", "ls -lR warm, "+root, oursPrefix, directory, 1/1.5),
		figure("first sequential read at least 1 GB/s", "first sequential read, "+randomFile, oursPrefix, 1e9),
		figure("first sequential read of compressed text at least 0.5 GB/s", "first sequential read, "+textFile, oursZstd, 0.5e9),
		against("random reads of 4 KiB at least 5 times as many as the reference's", "4 KiB random reads, "+randomFile, oursPrefix, reference, 5),
		against("second sequential read as fast as the directory's, within a tenth", "second sequential read, "+randomFile, oursPrefix, directory, 0.9),
		figure("at most 150 MiB of memory after reading all", "memory after reading all, "+root, oursPrefix, 150<<20),
	}
}

// aimsTable says which aims were reached. Those that were not measured in this run are left out.
func (r *report) aimsTable(all []aim) string {
	var s strings.Builder
	for _, a := range all {
		ours, unit, ok := r.find(a.ours)
		if !ok {
			continue
		}
		figure, reached := unit.format(ours)+" "+string(unit), ours <= a.want
		if unit.more() {
			reached = ours >= a.want
		}
		if a.other != (place{}) {
			other, _, ok := r.find(a.other)
			if !ok {
				continue
			}
			ratio := other / ours
			if unit.more() {
				ratio = ours / other
			}
			figure, reached = fmt.Sprintf("%.2f", ratio), ratio >= a.want
		}
		verdict := "missed"
		if reached {
			verdict = "reached"
		}
		fmt.Fprintf(&s, "| %s | %s | %s |\n", a.text, figure, verdict)
	}
	if s.Len() == 0 {
		return ""
	}
	return "\n## Aims\n\nRatios say how many times better ours is.\n\n| aim | measured | |\n|---|---|---|\n" + s.String()
}

// find returns the median of a figure and what it counts.
func (r *report) find(p place) (float64, unit, bool) {
	for _, result := range r.Results {
		for _, f := range result.Figures {
			if result.Name == p.measurement && f.Contender == p.contender {
				return f.median(), result.Unit, true
			}
		}
	}
	return 0, "", false
}
