package driver

// Policy says which images may be mounted on the node. It is looked at whenever an image is to
// be had: at each new publish, and when lost content of a published volume is fetched again. A
// volume that is published stays as it is, whatever the policy says later.
type Policy struct {
	// RequireDigest refuses volumes that are named by a tag only. It should be set.
	RequireDigest bool
}
