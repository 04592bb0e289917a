// Package registry moves PuzzleFS images between an OCI distribution registry and a local
// content store: it resolves a reference to a manifest, pulls what the store lacks and
// pushes what the registry lacks.
//
//	reference ──► certs.d/HOST/hosts.toml ──► endpoints: mirrors in file order, then the server
//	                                            │
//	      manifest ◄── GET /v2/REPO/manifests/… ┤   by tag: only where "resolve" is allowed
//	      blobs    ◄── GET /v2/REPO/blobs/…     ┘   by digest: any mirror, many in parallel
//
// The package owns the protocol: which endpoint is asked, with whose credentials, how often,
// and what an answer means. Every byte is checked against its SHA-256 before the store gets it
// under that name, whatever the endpoint claims.
//
// What it must never do: send credentials to another host than the one they are for, speak
// plain HTTP to anything but a loopback address unless the administrator's hosts.toml says so,
// skip the verification of a certificate or a digest, write credentials to disk, or let a
// secret, a token or a signed URL into an error or a log line.
package registry
