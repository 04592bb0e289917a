package deploy_test

import (
	"encoding/json"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

// TestSchemaRefuses: a value that cannot be meant is refused, with a message that names its place
// and says what is wrong.
func TestSchemaRefuses(t *testing.T) {
	tests := []struct {
		name, values string
		says         []string
	}{
		{"typo at the top", `kubeletRootdir: /data`, []string{"kubeletRootdir"}},
		{"typo in the image", `image: {tga: v1}`, []string{"image", "tga"}},
		{"typo in a policy", `policy: {requireDigests: false}`, []string{"policy", "requireDigests"}},
		{"typo in a host", `registries: {hosts: {r.example.com: {hosts.toml: x}}}`, []string{"r.example.com", "hosts.toml"}},
		{"typo in a probe", `livenessProbe: {periodSecond: 1}`, []string{"livenessProbe", "periodSecond"}},
		{"typo in resources", `resources: {limit: {memory: 1Gi}}`, []string{"resources", "limit"}},
		{"typo in a sidecar", `registrar: {enable: true}`, []string{"registrar", "enable"}},
		{"boolean as text", `policy: {requireDigest: "false"}`, []string{"requireDigest", "string", "boolean"}},
		{"port as text", `http: {port: "9809"}`, []string{"port", "string", "integer"}},
		{"port out of range", `http: {port: 70000}`, []string{"/http/port", "65,535"}},
		{"label as a number", `podLabels: {version: 1}`, []string{"podLabels", "version", "string"}},
		{"digest without algorithm", `image: {digest: ` + strings.Repeat("a", 64) + `}`, []string{"digest", "sha256"}},
		{"digest in the repository", `image: {repository: r.io/a@sha256:1}`, []string{"repository"}},
		{"tag in the repository", `image: {repository: "r.io/a:v1"}`, []string{"repository"}},
		{"pull policy", `image: {pullPolicy: always}`, []string{"pullPolicy", "IfNotPresent"}},
		{"log level", `log: {level: trace}`, []string{"level", "debug"}},
		{"log format", `log: {format: logfmt}`, []string{"format", "json"}},
		{"relative kubelet directory", `kubeletRootDir: var/lib/kubelet`, []string{"kubeletRootDir"}},
		{"slash at the end", `kubeletRootDir: /var/lib/kubelet/`, []string{"kubeletRootDir"}},
		{"kubelet directory too long for a socket", `kubeletRootDir: /` + strings.Repeat("x", 66), []string{"kubeletRootDir", "66"}},
		{"registry with a scheme", `policy: {allowedRegistries: ["https://r.io"]}`, []string{"allowedRegistries"}},
		{"registry with a slash at the end", `policy: {allowedRegistries: [r.io/]}`, []string{"allowedRegistries"}},
		{"registries as text", `policy: {allowedRegistries: r.io}`, []string{"allowedRegistries", "array"}},
		{"key that is private", `policy: {signatureKeys: {k.pem: "-----BEGIN EC PRIVATE KEY-----"}}`, []string{"k.pem", "PUBLIC"}},
		{"key in a directory", `policy: {signatureKeys: {a/k.pem: "-----BEGIN PUBLIC KEY-----"}}`, []string{"a/k.pem"}},
		{"mount option", `policy: {mountOptions: [ro]}`, []string{"mountOptions", "nosuid"}},
		{"quantity", `store: {quota: 200 GB}`, []string{"quota"}},
		{"part above the whole", `store: {reserve: 110%}`, []string{"reserve"}},
		{"negative limit", `policy: {maxInodes: -1}`, []string{"maxInodes", "minimum"}},
		{"no memory", `memory: {metadata: 0}`, []string{"/memory/metadata"}},
		{"duration", `events: {slowPull: 30}`, []string{"slowPull", "string"}},
		{"host with a path", `registries: {hosts: {r.io/team: {hostsToml: x}}}`, []string{"r.io/team"}},
		{"secret without keys", `registries: {hosts: {r.io: {secret: {name: s}}}}`, []string{"secret", "keys"}},
		{"update strategy", `daemonSet: {updateStrategy: {type: Recreate}}`, []string{"updateStrategy", "OnDelete"}},
		{"two drivers on a node", `daemonSet: {updateStrategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1}}}`, []string{"maxSurge"}},
		{"no time to stop", `terminationGracePeriodSeconds: 1`, []string{"terminationGracePeriodSeconds", "15"}},
		{"unknown alert", `prometheusRule: {disabled: [PuzzleFSDown]}`, []string{"disabled", "PuzzleFSDriverDown"}},
		{"action of a policy", `admissionPolicy: {validationActions: [Refuse]}`, []string{"validationActions", "Deny"}},
		{"no action", `admissionPolicy: {validationActions: []}`, []string{"validationActions", "minItems"}},
		{"digest of the test", `test: {volume: {digest: latest}}`, []string{"digest", "verity"}},
		// Not the schema's to say, but refused all the same.
		{"two certificate directories", `registries: {hosts: {r.io: {hostsToml: x}}, hostPath: /etc/containerd/certs.d}`, []string{"give one of them"}},
		{"policy without rules", `{policy: {requireDigest: false}, admissionPolicy: {enabled: true}}`, []string{"no rule to enforce"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := render(values(t, tt.values))
			if err == nil {
				t.Fatal("it was accepted")
			}
			for _, want := range tt.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the message does not say %q: %v", want, err)
				}
			}
		})
	}
}

// TestSchemaAccepts values that are easily refused by mistake.
func TestSchemaAccepts(t *testing.T) {
	for name, text := range map[string]string{
		"parent chart":        `global: {imageRegistry: r.io}`,
		"registry with port":  `image: {repository: "localhost:5000/csi-puzzlefs"}`,
		"numbers of bytes":    `{policy: {maxImageSize: 21474836480}, store: {quota: 0, reserve: 1000000}}`,
		"part":                `store: {reserve: 2.5%}`,
		"hosts":               `registries: {hosts: {localhost: {hostsToml: x}, "10.0.0.1:5000": {files: {ca.crt: x}}, _default: {hostsToml: x}}}`,
		"resources":           `resources: {limits: {cpu: 2, memory: 1.5Gi, ephemeral-storage: 1e9}, requests: {cpu: 100m}}`,
		"no resources":        `resources: null`,
		"no tolerations":      `tolerations: []`,
		"no priority":         `priorityClassName: ""`,
		"percent unavailable": `daemonSet: {updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 10%, maxSurge: 0}}}`,
		"RSA key":             `policy: {signatureKeys: {k.pub: "\n-----BEGIN RSA PUBLIC KEY-----"}}`,
		"digest forms":        `test: {volume: {image: r.io/a, digest: "verity:` + strings.Repeat("a", 64) + `"}}`,
		"environment":         `extraEnv: [{name: A, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}]`,
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := render(values(t, text)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSchemaRefusesTypos: wherever values.yaml has a table, an unknown key in it is refused, but
// for tables of anybody's names, in which values have to be text.
func TestSchemaRefusesTypos(t *testing.T) {
	free := map[string]bool{"": false, "global": true}
	for place := range tables(t, defaults(t), "") {
		if free[place] {
			continue
		}
		t.Run(place, func(t *testing.T) {
			v := map[string]any{}
			inner := v
			for _, key := range strings.Split(place, "/") {
				if key != "" {
					next := map[string]any{}
					inner[key] = next
					inner = next
				}
			}
			inner["noSuchKey"] = 1
			_, err := render(v)
			if err == nil || !strings.Contains(err.Error(), "noSuchKey") {
				t.Errorf("got %v, want a complaint about noSuchKey", err)
			}
		})
	}
}

func defaults(t *testing.T) map[string]any {
	t.Helper()
	b, err := os.ReadFile(chartDir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return values(t, string(b))
}

// tables returns the paths of all tables in v.
func tables(t *testing.T, v map[string]any, at string) map[string]bool {
	t.Helper()
	all := map[string]bool{at: true}
	for key, value := range v {
		if m, ok := value.(map[string]any); ok {
			maps.Copy(all, tables(t, m, path.Join(at, key)))
		}
	}
	return all
}

// TestSchemaHasNothingElse: every key that the schema allows is in values.yaml, where it is
// documented, but for what lies inside of objects of Kubernetes.
func TestSchemaHasNothingElse(t *testing.T) {
	b, err := os.ReadFile(chartDir + "/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	kubernetes := []string{"affinity", "resources", "rollingUpdate", "startupProbe", "livenessProbe", "readinessProbe", "namespaceSelector"}
	var compare func(at string, schema, values any)
	compare = func(place string, schema, values any) {
		if slices.Contains(kubernetes, path.Base(place)) {
			return
		}
		properties, _ := at(schema, "properties").(map[string]any)
		for key, inner := range properties {
			table, _ := values.(map[string]any)
			value, ok := table[key]
			if !ok && !slices.Contains(kubernetes, key) {
				t.Errorf("the schema allows %s, which values.yaml does not have", path.Join(place, key))
			}
			compare(path.Join(place, key), inner, value)
		}
	}
	compare("", schema, any(defaults(t)))
}

// TestValuesAreDocumented: helm-docs writes a row without a meaning for a value without a comment
// that it takes for one.
func TestValuesAreDocumented(t *testing.T) {
	b, err := os.ReadFile(rootDir + "/docs/helm-values.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		rows++
		if len(cells) != 4 || strings.Trim(cells[3], " |") == "" {
			t.Errorf("no meaning, or one with a bar in it: %s", line)
		}
	}
	if rows < len(defaults(t)) {
		t.Errorf("%d rows for %d values; run make generate", rows, len(defaults(t)))
	}
}
