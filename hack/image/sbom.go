package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/uuid"
	"github.com/package-url/packageurl-go"
)

// billOfMaterials returns the program's bill of materials as CycloneDX 1.6 in JSON: the modules
// that the linker says are in it, and Go's standard library, under the names by which scanners
// look up vulnerabilities.
func (s *source) billOfMaterials(bin []byte, p v1.Platform) ([]byte, error) {
	info, err := buildinfo.Read(bytes.NewReader(bin))
	if err != nil {
		return nil, fmt.Errorf("read build info: %w", err)
	}
	sum := sha256.Sum256(bin)
	self := goComponent(cdx.ComponentTypeApplication, info.Main.Path, "v"+s.version)
	self.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}}
	self.Licenses = &cdx.Licenses{{License: &cdx.License{ID: license}}}
	properties := []cdx.Property{{Name: "platform", Value: p.String()}}
	for _, setting := range info.Settings {
		properties = append(properties, cdx.Property{Name: "go:build:" + setting.Key, Value: setting.Value})
	}
	self.Properties = &properties

	components := []cdx.Component{
		goComponent(cdx.ComponentTypeLibrary, "stdlib", strings.TrimPrefix(info.GoVersion, "go")),
	}
	for _, m := range info.Deps {
		c, err := moduleComponent(m)
		if err != nil {
			return nil, err
		}
		components = append(components, c)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	refs := make([]string, len(components))
	for i, c := range components {
		refs[i] = c.BOMRef
	}

	bom := cdx.NewBOM()
	// As unique as the program that it describes, and no more: the same bytes on every run.
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, append([]byte(self.BOMRef), sum[:]...)).URN()
	bom.Metadata = &cdx.Metadata{Timestamp: s.created.Format(time.RFC3339), Component: &self}
	bom.Components = &components
	// The linker knows what is in the program, not who asked for it.
	bom.Dependencies = &[]cdx.Dependency{{Ref: self.BOMRef, Dependencies: &refs}}
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return nil, fmt.Errorf("encode bill of materials: %w", err)
	}
	return out.Bytes(), nil
}

// moduleComponent describes a module, or what stands in for it.
func moduleComponent(m *debug.Module) (cdx.Component, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	c := goComponent(cdx.ComponentTypeLibrary, m.Path, m.Version)
	if encoded, ok := strings.CutPrefix(m.Sum, "h1:"); ok {
		sum, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return cdx.Component{}, fmt.Errorf("module %s: checksum %q: %w", m.Path, m.Sum, err)
		}
		c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum)}}
	}
	return c, nil
}

func goComponent(kind cdx.ComponentType, modulePath, version string) cdx.Component {
	namespace, name := "", modulePath
	if i := strings.LastIndexByte(modulePath, '/'); i >= 0 {
		namespace, name = modulePath[:i], modulePath[i+1:]
	}
	purl := packageurl.NewPackageURL(packageurl.TypeGolang, namespace, name, version, nil, "").ToString()
	return cdx.Component{Type: kind, BOMRef: purl, Name: modulePath, Version: version, PackageURL: purl}
}
