package e2e_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestShare: the shards have each part once, in order.
func TestShare(t *testing.T) {
	var all []part
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		all = append(all, part{name: name})
	}
	for shard, want := range map[string][]string{
		"1/1": {"a", "b", "c", "d", "e"}, "1/2": {"a", "b", "c"}, "2/2": {"d", "e"},
		"1/3": {"a", "b"}, "2/3": {"c", "d"}, "3/3": {"e"}, "6/6": nil,
	} {
		got, err := share(shard, all)
		must(t, err)
		var names []string
		for _, p := range got {
			names = append(names, p.name)
		}
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("shard %s (-want +got):\n%s", shard, diff)
		}
	}
	for _, shard := range []string{"", "1", "0/2", "3/2", "a/b", "1/0"} {
		if _, err := share(shard, all); err == nil {
			t.Errorf("shard %q: no error", shard)
		}
	}
}
