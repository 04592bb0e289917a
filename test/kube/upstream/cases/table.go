package cases

import "regexp"

// applying are the cases that show something of a driver whose volumes are read-only images: the
// names, as far as they are behind that of the driver. All must pass.
func applying() []string {
	return []string{
		// Inline volumes. Two of these do not ask for a read-only volume, and do not write to
		// one that pods share; see GetVolume of the test driver.
		"[Testpattern: CSI Ephemeral-volume (default fs)] ephemeral should create read-only inline ephemeral volume",
		"[Testpattern: CSI Ephemeral-volume (default fs)] ephemeral should support two pods which have the same volume definition",
		"[Testpattern: CSI Ephemeral-volume (default fs)] ephemeral should support multiple inline ephemeral volumes",
		// A subPath that is not in the volume is not made there.
		"[Testpattern: Inline-volume (default fs)] subPath should verify container cannot write to subpath readonly volumes [Slow]",

		// Static PersistentVolumes.
		"[Testpattern: Pre-provisioned PV (default fs)] subPath should verify container cannot write to subpath readonly volumes [Slow]",
		"[Testpattern: Pre-provisioned PV (filesystem volmode)] multiVolume [Slow] should concurrently access the single read-only volume from pods on the same node",
		"[Testpattern: Pre-provisioned PV (filesystem volmode)] volumeMode should not mount / map unused volumes in a pod [LinuxOnly]",
		"[Testpattern: Pre-provisioned PV (block volmode)] volumeMode should fail to create pod by failing to mount volume [Slow]",
	}
}

// group is a number of cases that do not apply, for one reason.
type group struct {
	// cases matches the names of the cases. Of several groups that match, the first counts.
	cases *regexp.Regexp
	// words match what the suites say when they skip a case of the group by themselves. nil means
	// that they would run it, and that it is we who leave it out.
	words  *regexp.Regexp
	reason string
}

// notApplying are all the other cases. Those that we leave out come first.
func notApplying() []group {
	const (
		writes  = "it writes to the volume first; images are read-only"
		static  = `\[Testpattern: (Inline-volume|Pre-provisioned PV) \(default fs\)\] `
		staticF = `\[Testpattern: Pre-provisioned PV \(filesystem volmode\)\] `
	)
	of := func(cases, words, reason string) group {
		g := group{cases: regexp.MustCompile(cases), reason: reason}
		if words != "" {
			g.words = regexp.MustCompile(words)
		}
		return g
	}
	return []group{
		of(`\[Disruptive\]`, "",
			"it stops kubelet through SSH, where there is none; our own suite restarts kubelet and reboots nodes"),
		of(static+`(volumes|volumeIO) `, "", writes),
		of(static+`subPath should (support|fail|be able to unmount)`, "", writes+
			"; our own suite mounts sub-paths that the image has"),
		of(staticF+`multiVolume \[Slow\] should concurrently access the single volume from pods on the same node`, "", writes),

		of(`\[Testpattern: CSI Ephemeral-volume .*create read/write inline`, `is read-only, but the test needs a read/write volume`, writes),
		of(`\[Testpattern: CSI Ephemeral-volume .*expansion of pvcs`, `Skipping CSIInlineVolume test for expansion`,
			"inline volumes have no claim that could grow"),
		of(`\[Testpattern: (Generic Ephemeral-volume|Ephemeral Snapshot)`, `doesn't support GenericEphemeralVolume`,
			"it wants volumes made on demand; there is nothing to provision"),
		of(`\[Testpattern: (Dynamic PV|(Dynamic |Pre-provisioned )?(Volume)?(Group)?Snapshot| \((delete|retain) policy\))`, `doesn't support DynamicPV`,
			"it wants volumes made on demand, to grow, modify, snapshot or clone; there is nothing to provision"),
		of(`\((ext3|ext4|xfs|ntfs)\)`, `doesn't support (ext3|ext4|xfs|ntfs)`,
			"a PuzzleFS image is its own file system"),
		of(`\(block volmode\)`, `does not provide raw block|doesn't support Block`,
			"a PuzzleFS image is not a block device"),
		of(staticF+`volumeMode should fail to use a volume in a pod with mismatched mode`, `does not provide raw block`,
			"a PuzzleFS image is not a block device"),
		of(staticF+`multiVolume .* two volumes with`, `doesn't work with pre-provisioned volume|covered by block volume case`,
			"the suite runs it with volumes made on demand only"),
		of(staticF+`multiVolume .* (restored snapshot|its clone)`, `does not support volume (snapshots|clone)`,
			"images are neither cloned nor snapshot: they do not change"),
		of(staticF+`multiVolume .* single volume from pods on different node`, `doesn't support RWX`, writes),
	}
}
