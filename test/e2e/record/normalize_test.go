package record_test

import (
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

func TestNormalize(t *testing.T) {
	for name, c := range map[string]struct{ output, want string }{
		"what does not vary": {
			"pod/inline-volume condition met\npushed: x (625 of 625 bytes were new)\n",
			"pod/inline-volume condition met\npushed: x (625 of 625 bytes were new)\n",
		},
		"names of pods": {
			"pod/csi-puzzlefs-cbq2d condition met\npod/csi-puzzlefs-x9z4k condition met\n",
			"pod/csi-puzzlefs-xxxxx condition met\npod/csi-puzzlefs-xxxxx condition met\n",
		},
		"times": {
			"NAME: a\nLAST DEPLOYED: Sun Nov 22 11:51:55 2026\nSTATUS: deployed\n",
			"NAME: a\nLAST DEPLOYED: …\nSTATUS: deployed\n",
		},
		"events": {
			`Name:  inline-volume
Events:
  Type     Reason         Age              From               Message
  ----     ------         ----             ----               -------
  Warning  FailedMount    0s (x2 over 1s)  kubelet            MountVolume.SetUp failed for volume "models" :  two spaces
  Normal   Scheduled      12s              default-scheduler  Successfully assigned default/inline-volume to node-2
  Warning  ImageNotFound  1s (x2 over 1s)  csi-puzzlefs       there is no manifest
`,
			`Name:  inline-volume
Events:
  Type     Reason         Age   From               Message
  ----     ------         ----  ----               -------
  Normal   Scheduled      0s    default-scheduler  Successfully assigned default/inline-volume to NODE
  Warning  ImageNotFound  0s    csi-puzzlefs       there is no manifest
  Warning  FailedMount    0s    kubelet            MountVolume.SetUp failed for volume "models" :  two spaces
`,
		},
		"no events": {"Name: a\nEvents:  <none>\n", "Name: a\nEvents:  <none>\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, record.Normalize(c.output)); diff != "" {
				t.Errorf("normalized (- want, + got):\n%s", diff)
			}
		})
	}
}

func TestCut(t *testing.T) {
	const output = "a\nb\nc\nd\n"
	for name, c := range map[string]struct {
		step record.Step
		want string
	}{
		"all":              {record.Step{}, output},
		"from":             {record.Step{From: regexp.MustCompile("c")}, "[…]\nc\nd\n"},
		"from the start":   {record.Step{From: regexp.MustCompile("a")}, output},
		"until":            {record.Step{Until: regexp.MustCompile("c")}, "a\nb\n[…]\n"},
		"both":             {record.Step{From: regexp.MustCompile("b"), Until: regexp.MustCompile("d")}, "[…]\nb\nc\n[…]\n"},
		"none that is one": {record.Step{From: regexp.MustCompile("x"), Until: regexp.MustCompile("y")}, output},
	} {
		t.Run(name, func(t *testing.T) {
			if got := c.step.Cut(output); got != c.want {
				t.Errorf("shows %q, want %q", got, c.want)
			}
		})
	}
}
