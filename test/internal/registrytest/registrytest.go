// Package registrytest runs the distribution project's registry, the one that most people
// run, within the process and on loopback: open to all, behind basic authentication, or behind
// a token server. It is for tests and for the demo.
package registrytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd" // registers itself
	_ "github.com/distribution/distribution/v3/registry/auth/token"    // registers itself
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // registers itself
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"   // registers itself
	"github.com/sirupsen/logrus"
	"golang.org/x/crypto/bcrypt"
)

// Config says what registry to run. The zero value is one in memory that is open to all.
type Config struct {
	// Dir keeps the content in files below a directory; "" keeps it in memory.
	Dir string
	// Users are names and passwords; nil lets everyone in.
	Users map[string]string
	// Tokens gives bearer tokens to Users, at /auth/token of the same address, instead of
	// taking their passwords with each request. Others get tokens for pulling.
	Tokens bool
	// Wrap, if not nil, returns what is to serve instead of the registry that it is given.
	Wrap func(http.Handler) http.Handler
}

// silence keeps the registry's log, which is logrus's own, off the terminal.
var silence = sync.OnceFunc(func() { logrus.SetOutput(io.Discard) })

// Start runs a registry and returns its HOST:PORT on 127.0.0.1, ready to be asked by plain
// HTTP, and a function that stops it and waits until it has stopped. As a side effect
// logrus's standard logger falls silent.
func Start(cfg Config) (addr string, stop func(), err error) {
	silence()
	dir, err := os.MkdirTemp("", "registrytest")
	if err != nil {
		return "", nil, fmt.Errorf("start registry: %w", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("start registry: %w", err), os.RemoveAll(dir))
	}
	addr = l.Addr().String()
	app, tokens, err := newApp(cfg, addr, dir)
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("start registry: %w", err), l.Close(), os.RemoveAll(dir))
	}
	var handler http.Handler = app
	if cfg.Wrap != nil {
		handler = cfg.Wrap(handler)
	}
	mux := http.NewServeMux()
	mux.Handle("/", handler)
	if tokens != nil {
		mux.Handle(tokenPath, tokens)
	}
	srv := &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends with http.ErrServerClosed
	}()
	stop = sync.OnceFunc(func() {
		_ = srv.Close()
		<-done
		_ = app.Shutdown()
		_ = os.RemoveAll(dir)
	})
	return addr, stop, nil
}

// newApp makes the registry; dir is for its own files.
func newApp(cfg Config, addr, dir string) (*handlers.App, *tokenServer, error) {
	c := new(configuration.Configuration)
	c.HTTP.Secret = "for this process only"
	c.Storage = configuration.Storage{
		"inmemory":    {},
		"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
	}
	if cfg.Dir != "" {
		delete(c.Storage, "inmemory")
		c.Storage["filesystem"] = configuration.Parameters{"rootdirectory": cfg.Dir}
	}
	var tokens *tokenServer
	switch {
	case cfg.Tokens:
		var err error
		if tokens, err = newTokenServer(cfg.Users); err != nil {
			return nil, nil, err
		}
		keys := filepath.Join(dir, "keys.json")
		if err := os.WriteFile(keys, tokens.publicKeys, 0o600); err != nil {
			return nil, nil, err
		}
		c.Auth = configuration.Auth{"token": {
			"realm": "http://" + addr + tokenPath, "issuer": tokenIssuer, "service": tokenService, "jwks": keys,
		}}
	case cfg.Users != nil:
		var lines []byte
		for name, password := range cfg.Users {
			hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
			if err != nil {
				return nil, nil, err
			}
			lines = fmt.Appendf(lines, "%s:%s\n", name, hash)
		}
		file := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(file, lines, 0o600); err != nil {
			return nil, nil, err
		}
		c.Auth = configuration.Auth{"htpasswd": {"realm": "test", "path": file}}
	}
	return handlers.NewApp(context.Background(), c), tokens, nil
}
