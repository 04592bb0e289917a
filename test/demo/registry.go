package main

import "github.com/csi-puzzlefs/csi-puzzlefs/test/internal/registrytest"

// startRegistry starts the distribution project's registry on loopback, open to all.
func startRegistry() (addr string, stop func() error, err error) {
	addr, end, err := registrytest.Start(registrytest.Config{})
	return addr, func() error { end(); return nil }, err
}
