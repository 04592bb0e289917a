package main

import (
	"context"

	"github.com/onsi/ginkgo/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubernetes/test/e2e/framework"
	e2epod "k8s.io/kubernetes/test/e2e/framework/pod"
	storageframework "k8s.io/kubernetes/test/e2e/storage/framework"
	"k8s.io/utils/ptr"
)

// driverName is what our CSIDriver object, and the volumes of pods, call the driver.
const driverName = "csi.puzzlefs.io"

// testDriver tells Kubernetes' suites what our driver is. It declares what is true of the driver
// and nothing else; the suites choose their cases by it.
//
// There are three ways in which a pod gets a volume of it: the ephemeral inline volume that
// suites make by themselves from attributes, the same as a complete volume source (which the
// suites that predate CSI ask for), and a PersistentVolume that a person wrote.
type testDriver struct {
	info       storageframework.DriverInfo
	attributes map[string]string
}

var (
	_ storageframework.EphemeralTestDriver        = (*testDriver)(nil)
	_ storageframework.InlineVolumeTestDriver     = (*testDriver)(nil)
	_ storageframework.PreprovisionedPVTestDriver = (*testDriver)(nil)
	_ storageframework.CustomTimeoutsTestDriver   = (*testDriver)(nil)
)

// newTestDriver describes our driver with volumes of the PuzzleFS image that attributes name.
func newTestDriver(attributes map[string]string) *testDriver {
	return &testDriver{
		attributes: attributes,
		info: storageframework.DriverInfo{
			Name: driverName,
			// "" is: whatever the driver makes of it. There is no file system to choose.
			SupportedFsType:     sets.NewString(""),
			RequiredAccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany},
			// What is not named is not there: raw block devices, changing owners by fsGroup,
			// snapshots, clones, growing, topology.
			Capabilities: map[storageframework.Capability]bool{
				storageframework.CapPersistence:       true, // an image does not change
				storageframework.CapExec:              true,
				storageframework.CapMultiPODs:         true,
				storageframework.CapReadOnlyMany:      true,
				storageframework.CapMultiplePVsSameID: true,
			},
		},
	}
}

func (d *testDriver) GetDriverInfo() *storageframework.DriverInfo {
	return &d.info
}

// SkipUnsupportedTest refuses nothing: the framework sees in the driver's methods which kinds of
// volumes it has.
func (d *testDriver) SkipUnsupportedTest(storageframework.TestPattern) {}

func (d *testDriver) PrepareTest(_ context.Context, f *framework.Framework) *storageframework.PerTestConfig {
	return &storageframework.PerTestConfig{
		Driver:    d,
		Prefix:    "puzzlefs",
		Framework: f,
		ClientNodeSelection: e2epod.NodeSelection{
			Selector: map[string]string{corev1.LabelOSStable: "linux"},
		},
	}
}

// GetTimeouts returns the framework's own, which a slow machine needs; nothing waits for their
// end but what fails.
func (d *testDriver) GetTimeouts() *framework.TimeoutContext {
	return framework.NewTimeoutContext()
}

// GetVolume returns the attributes of an inline volume: one image, which all pods share, and
// which nobody can write to.
//
// To two of the cases it does not say the latter. They mount a volume without asking for a
// read-only one, and do not write to it, because it is shared; what they show is how many pods and
// volumes of ours there can be. But of a volume that is read-only they would only say that it is
// not what they need, and skip.
func (d *testDriver) GetVolume(*storageframework.PerTestConfig, int) (attributes map[string]string, shared, readOnly bool) {
	switch ginkgo.CurrentSpecReport().LeafNodeText {
	case "should support two pods which have the same volume definition", "should support multiple inline ephemeral volumes":
		return d.attributes, true, false
	}
	return d.attributes, true, true
}

func (d *testDriver) GetCSIDriverName(*storageframework.PerTestConfig) string {
	return driverName
}

// image is the volume that cases with volumes made beforehand get: the image, which is in its
// registry already, and stays there.
type image struct{}

func (image) DeleteVolume(context.Context) {}

func (d *testDriver) CreateVolume(context.Context, *storageframework.PerTestConfig, storageframework.TestVolType) storageframework.TestVolume {
	return image{}
}

// GetVolumeSource returns an inline volume. It is read-only also for those who did not ask for
// that: the driver refuses any other.
func (d *testDriver) GetVolumeSource(bool, string, storageframework.TestVolume) *corev1.VolumeSource {
	return &corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver:           driverName,
		ReadOnly:         ptr.To(true),
		VolumeAttributes: d.attributes,
	}}
}

// GetPersistentVolumeSource returns the source of a static PersistentVolume, which any node can
// mount. It does not say readOnly, as PersistentVolumes need not: what mounts it read-only is the
// driver.
func (d *testDriver) GetPersistentVolumeSource(bool, string, storageframework.TestVolume) (*corev1.PersistentVolumeSource, *corev1.VolumeNodeAffinity) {
	return &corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
		Driver:           driverName,
		VolumeHandle:     "upstream-suite",
		VolumeAttributes: d.attributes,
	}}, nil
}
