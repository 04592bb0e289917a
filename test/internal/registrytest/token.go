package registrytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/distribution/distribution/v3/registry/auth/token"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	tokenPath    = "/auth/token"
	tokenIssuer  = "registrytest"
	tokenService = "registry"
	tokenKeyID   = "test"
	tokenLife    = time.Minute
)

// tokenServer gives tokens: to users for what they ask, to others for pulling.
type tokenServer struct {
	users  map[string]string
	signer jose.Signer
	// publicKeys is a JSON Web Key Set.
	publicKeys []byte
}

func newTokenServer(users map[string]string) (*tokenServer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make token key: %w", err)
	}
	ts := &tokenServer{users: users}
	ts.signer, err = jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: tokenKeyID}},
		new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("make token signer: %w", err)
	}
	ts.publicKeys, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: key.Public(), KeyID: tokenKeyID, Algorithm: string(jose.ES256), Use: "sig"},
	}})
	if err != nil {
		return nil, fmt.Errorf("encode token key: %w", err)
	}
	return ts, nil
}

// ServeHTTP answers a request for a token.
func (ts *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, ok := r.BasicAuth()
	if want, known := ts.users[user]; ok && (!known || password != want) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var access []*token.ResourceActions
	for _, scope := range r.URL.Query()["scope"] {
		kind, rest, _ := strings.Cut(scope, ":")
		i := strings.LastIndex(rest, ":")
		if i < 0 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		actions := strings.Split(rest[i+1:], ",")
		if !ok {
			actions = []string{"pull"}
		}
		access = append(access, &token.ResourceActions{Type: kind, Name: rest[:i], Actions: actions})
	}
	now := time.Now()
	text, err := jwt.Signed(ts.signer).Claims(token.ClaimSet{
		Issuer: tokenIssuer, Subject: user, Audience: token.AudienceList{tokenService}, Access: access,
		IssuedAt: now.Unix(), NotBefore: now.Unix(), Expiration: now.Add(tokenLife).Unix(),
	}).Serialize()
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": text, "expires_in": int(tokenLife.Seconds())})
}
