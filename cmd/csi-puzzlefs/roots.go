package main

import (
	"crypto/x509"
	"sync"

	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// trustFallbackRoots makes TLS trust the roots that this program has with it where the system brings none, as
// in the container image. Whoever is about to talk to the network calls it: to parse more than a hundred
// certificates takes longer than to start the program, and to mount an image nobody needs them.
var trustFallbackRoots = sync.OnceFunc(func() {
	pool := x509.NewCertPool()
	for root := range bundle.Roots() {
		cert, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			continue // who needs it is told that its issuer is unknown
		}
		if root.Constraint == nil {
			pool.AddCert(cert)
		} else {
			pool.AddCertWithConstraint(cert, root.Constraint)
		}
	}
	x509.SetFallbackRoots(pool)
})
