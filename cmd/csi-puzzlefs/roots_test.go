package main

import (
	"crypto/x509"
	"fmt"
	"os"
)

// printTrust is a command of scripts. It prints whether TLS trusts anybody when the program starts, and when
// it is about to talk to a registry, however often it is.
func printTrust() {
	var trust [2]bool
	for i := range trust {
		pool, err := x509.SystemCertPool()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitError)
		}
		trust[i] = !pool.Equal(x509.NewCertPool())
		new(registryFlags).config()
		new(registryFlags).config()
	}
	fmt.Println(trust[0], trust[1])
}
