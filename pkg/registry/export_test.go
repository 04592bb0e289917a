package registry

// Endpoint is what tests see of an endpoint.
type Endpoint struct {
	URL                 string
	Pull, Resolve, Push bool
	Mirror              bool
	CAs                 []string
	Pairs               [][2]string
	Header              map[string][]string
	DialTimeout, Proxy  string
}

// LoadEndpoints is loadEndpoints.
func LoadEndpoints(certsDir, registry string) ([]Endpoint, error) {
	eps, err := loadEndpoints(certsDir, registry)
	return export(eps), err
}

// ParseHosts is parseHosts.
func ParseHosts(b []byte, dir, registry string) ([]Endpoint, error) {
	eps, err := parseHosts(b, dir, registry)
	return export(eps), err
}

func export(eps []endpoint) []Endpoint {
	var list []Endpoint
	for _, e := range eps {
		x := Endpoint{
			URL: e.base.String(), Mirror: e.isMirror(), CAs: e.tls.cas, Pairs: e.tls.pairs, Header: e.header,
			Pull: e.caps&canPull != 0, Resolve: e.caps&canResolve != 0, Push: e.caps&canPush != 0,
		}
		if e.dialTimeout > 0 {
			x.DialTimeout = e.dialTimeout.String()
		}
		if e.proxy != nil {
			x.Proxy = e.proxy.String()
		}
		list = append(list, x)
	}
	return list
}
