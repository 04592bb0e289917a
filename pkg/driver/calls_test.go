package driver_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// TestLogOfAVolume: each call has an id that no other call ever has, which is also on the
// lines of the pull that it began; lines say for whom; and no line holds a secret.
func TestLogOfAVolume(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	const password = "sesame-open"
	reg.set(func(r *testRegistry) { r.password = password })
	ref := reg.push(t, im, "app", "1")
	log := n.logJSON()
	n.start()
	req := n.podRequest("a", ref, im.digest.String())
	req.Secrets = dockerSecret(reg.host, password)
	n.publish(req)
	n.publish(req) // nothing to do: no line at this level
	cached := n.podRequest("b", ref, im.digest.String())
	cached.Secrets = req.Secrets
	n.publish(cached)
	wrong := n.podRequest("c", ref, im.digest.String())
	wrong.Secrets = dockerSecret(reg.host, password+"!")
	n.refused(wrong, codes.Unauthenticated)
	n.unpublish(req)
	n.stop()
	n.start()
	n.unpublish(cached)
	n.stop()

	published := log.lines(t, "published a volume")
	if len(published) != 2 {
		t.Fatalf("%d lines about volumes that were published, want 2: %v", len(published), published)
	}
	for key, want := range map[string]any{
		"volume": "csi-a", "target": req.TargetPath, "image": ref, "pod": "team/a", "podUID": "uid-of-a", "cached": false,
		"method": "/csi.v1.Node/NodePublishVolume", "level": "INFO",
	} {
		if got := published[0][key]; got != want {
			t.Errorf("%s is %v, want %v", key, got, want)
		}
	}
	if took, ok := published[0]["took"].(float64); !ok || took <= 0 {
		t.Errorf("it took %v", published[0]["took"])
	}
	if published[1]["cached"] != true {
		t.Errorf("the second volume: %v, want cached", published[1])
	}
	for _, msg := range []string{"pulling an image", "pulled an image"} {
		lines := log.lines(t, msg)
		if len(lines) != 1 || lines[0]["request"] != published[0]["request"] {
			t.Errorf("%q: %v, want one line with the id of the call that began it, %v", msg, lines, published[0]["request"])
		}
	}
	failed := log.lines(t, "call failed")
	if len(failed) != 1 || failed[0]["pod"] != "team/c" || failed[0]["code"] != "Unauthenticated" {
		t.Errorf("failed calls: %v, want one", failed)
	}
	calls := append(append(published, failed...), log.lines(t, "unpublished a volume")...)
	calls = append(calls, log.lines(t, "call done")...)
	ids, boots := map[string]bool{}, map[string]bool{}
	for _, l := range calls {
		id, ok := l["request"].(string)
		if !ok || ids[id] {
			t.Errorf("the id %v is none, or not the only one: %v", l["request"], l)
		}
		ids[id] = true
		boot, _, _ := strings.Cut(id, "-")
		boots[boot] = true
	}
	if len(boots) != 2 {
		t.Errorf("ids of two drivers begin with %v, want two beginnings", boots)
	}
	for _, l := range log.lines(t, "") {
		if text := fmt.Sprint(l); strings.Contains(text, password) || strings.Contains(text, ".dockerconfigjson\":") {
			t.Errorf("a secret is in the log: %s", text)
		}
	}
}

// TestLogOfTheRegistryClient: what other packages log while they work for a call has its id.
func TestLogOfTheRegistryClient(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	log := n.logJSON()
	n.start()
	reg.set(func(r *testRegistry) { r.down = true })
	n.refused(n.podRequest("a", ref, im.digest.String()), codes.Unavailable)
	n.stop()
	failed, tries := log.lines(t, "call failed"), log.lines(t, "registry request failed, trying again")
	if len(failed) != 1 || len(tries) == 0 {
		t.Fatalf("%d failed calls and %d attempts, want 1 and some", len(failed), len(tries))
	}
	for _, l := range tries {
		if l["request"] != failed[0]["request"] {
			t.Errorf("an attempt for the call %v says %v", failed[0]["request"], l)
		}
	}
}

// TestLogOfAPullThatOutlivesItsCall still names the call that began it.
func TestLogOfAPullThatOutlivesItsCall(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	release := make(chan struct{})
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	log := n.logJSON()
	n.start()
	req := n.podRequest("a", ref, im.digest.String())
	ctx, cancel := shortContext(t)
	defer cancel()
	_, err := n.NodePublishVolume(ctx, req)
	if err == nil {
		t.Fatal("published without its blobs")
	}
	close(release)
	n.publish(req)
	n.unpublish(req)
	n.stop()
	failed, pulled := log.lines(t, "call failed"), log.lines(t, "pulled an image")
	if len(failed) == 0 || len(pulled) != 1 || pulled[0]["request"] != failed[0]["request"] {
		t.Errorf("failed calls %v, pulls %v; want the pull to name the first call", failed, pulled)
	}
}
