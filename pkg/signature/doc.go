// Package signature finds out whether an image is signed by one of the keys that an
// administrator chose. It reads what cosign 1 and 2 write, and cosign 3 with
// --new-bundle-format=false: simple signing, kept beside the image.
//
//	REPOSITORY:sha256-<hex>.sig            an OCI manifest; hex is the image's digest
//	  └ layers[i]                          one signature each
//	      ├ mediaType                      application/vnd.dev.cosign.simplesigning.v1+json
//	      ├ annotations                    dev.cosignproject.cosign/signature: base64
//	      └ blob, by digest and size       the payload, which is what was signed:
//
//	{"critical": {"identity": {"docker-reference": "registry.example/app"},
//	              "image": {"docker-manifest-digest": "sha256:<hex>"},
//	              "type": "cosign container image signature"},
//	 "optional": {…}}
//
// An image is signed if there is a layer whose payload has the layer's digest, is signed by a
// key, is of that type and names the image's digest. Only public keys count: certificates, the
// transparency log and time stamps are not looked at, since none of them is asked for. The
// docker-reference is not compared, as cosign does not by default either: a signature is for
// content, which may be copied to other repositories and be read through mirrors.
//
// The package makes no connection: what is in the registry comes through [Fetcher], and is
// bounded in number and size, since whoever may push to the repository may put anything there.
package signature
