// Package open opens the backend that a configuration describes.
package open

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	ociregistry "oras.land/oras-go/v2/registry"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/bucket"
	"podstasis.dev/stasis/internal/store/backend/dir"
	"podstasis.dev/stasis/internal/store/backend/registry"
	"podstasis.dev/stasis/internal/store/backend/web"
)

// Kind is what keeps the objects.
type Kind string

const (
	Directory Kind = "Directory"
	S3        Kind = "S3"
	GCS       Kind = "GCS"
	Azure     Kind = "Azure"
	Registry  Kind = "Registry"
)

// What Secrets hold, by their keys.
const (
	KeyAccessKeyID     = "access-key-id"     // S3
	KeySecretAccessKey = "secret-access-key" // S3
	KeySessionToken    = "session-token"     // S3, for credentials that end
	KeyServiceAccount  = "service-account.json"
	KeyAccountKey      = "account-key" // Azure: this or the next
	KeySASToken        = "sas-token"
	KeyUsername        = "username" // a registry, as in Secrets of the type kubernetes.io/basic-auth
	KeyPassword        = "password"
	KeyDockerConfig    = ".dockerconfigjson" // a registry, as in Secrets of the type kubernetes.io/dockerconfigjson
)

// Config describes a backend. What a kind has no use for is refused, not ignored.
type Config struct {
	Kind Kind

	Path string // Directory: absolute

	Bucket     string // S3, GCS; with Azure the container
	Prefix     string // S3, GCS, Azure: of the keys; a slash at its end is added
	Region     string // S3
	Endpoint   string // S3, GCS, Azure: the URL of a server that is not the provider's
	PathStyle  bool   // S3: the bucket in the path, not in the host name
	Account    string // Azure
	Repository string // Registry: HOST[:PORT]/PATH

	// Credentials are a Secret's data. Nothing is taken from the environment. Only a
	// registry may be used without.
	Credentials map[string][]byte
	// CA are certificates (PEM) to verify the server by, besides the system's.
	CA []byte
	// Insecure allows plain HTTP, with which anyone on the way reads the credentials.
	// There is no way to leave a certificate unverified: set CA.
	Insecure bool
}

// FieldError says which field of a Config is wrong.
type FieldError struct {
	Field string
	Err   error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }
func (e *FieldError) Unwrap() error { return e.Err }

func wrong(field, format string, args ...any) error {
	return &FieldError{field, fmt.Errorf(format, args...)}
}

var validPrefix = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9._=-]*/)*([A-Za-z0-9][A-Za-z0-9._=-]*/?)?$`)

var validAccount = regexp.MustCompile(`^[a-z0-9]{3,24}$`)

// uses are the fields that each kind has, and the keys of its Secret.
var uses = map[Kind]struct{ fields, keys []string }{
	Directory: {fields: []string{"path"}},
	S3:        {[]string{"bucket", "prefix", "region", "endpoint", "pathStyle", "ca", "insecure"}, []string{KeyAccessKeyID, KeySecretAccessKey, KeySessionToken}},
	GCS:       {[]string{"bucket", "prefix", "endpoint", "ca", "insecure"}, []string{KeyServiceAccount}},
	Azure:     {[]string{"bucket", "prefix", "endpoint", "account", "ca", "insecure"}, []string{KeyAccountKey, KeySASToken}},
	Registry:  {[]string{"repository", "ca", "insecure"}, []string{KeyUsername, KeyPassword, KeyDockerConfig}},
}

// Validate returns all that is wrong, each as a FieldError.
func (c *Config) Validate() error {
	use, known := uses[c.Kind]
	if !known {
		return wrong("kind", "%q is none of %s, %s, %s, %s, %s", c.Kind, Directory, S3, GCS, Azure, Registry)
	}
	var errs []error
	fail := func(field, format string, args ...any) { errs = append(errs, wrong(field, format, args...)) }
	for _, field := range []struct {
		name string
		set  bool
	}{
		{"path", c.Path != ""}, {"bucket", c.Bucket != ""}, {"prefix", c.Prefix != ""}, {"region", c.Region != ""}, {"endpoint", c.Endpoint != ""},
		{"pathStyle", c.PathStyle}, {"account", c.Account != ""}, {"repository", c.Repository != ""}, {"ca", len(c.CA) > 0}, {"insecure", c.Insecure},
	} {
		if field.set && !slices.Contains(use.fields, field.name) {
			fail(field.name, "is not used with the kind %s", c.Kind)
		}
	}
	if len(use.keys) == 0 && len(c.Credentials) > 0 {
		fail("credentials", "are not used with the kind %s", c.Kind)
	}
	for _, required := range []struct{ field, value string }{{"path", c.Path}, {"bucket", c.Bucket}, {"account", c.Account}, {"repository", c.Repository}} {
		if required.value == "" && slices.Contains(use.fields, required.field) {
			fail(required.field, "is required with the kind %s", c.Kind)
		}
	}
	if c.Kind == S3 && c.Region == "" {
		fail("region", "is required with the kind S3; us-east-1 where the server has no regions")
	}
	if c.Path != "" && (!filepath.IsAbs(c.Path) || filepath.Clean(c.Path) != c.Path || c.Path == "/") {
		fail("path", "%q is not an absolute path below / without . and .. in it", c.Path)
	}
	if strings.ContainsAny(c.Bucket, "/?#\\ ") {
		fail("bucket", "%q is no name of a bucket", c.Bucket)
	}
	if !validPrefix.MatchString(c.Prefix) || len(c.Prefix) > 500 {
		fail("prefix", "%q is not made of words of letters, digits and ._=- with slashes between", c.Prefix)
	}
	if c.Account != "" && !validAccount.MatchString(c.Account) {
		fail("account", "%q is not 3 to 24 lower-case letters and digits", c.Account)
	}
	if c.Endpoint != "" {
		u, err := url.Parse(c.Endpoint)
		switch {
		case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
			fail("endpoint", "%q is not https://HOST[:PORT][/PATH]", c.Endpoint)
		case u.Scheme == "http" && !c.Insecure:
			fail("endpoint", "%q is not encrypted: use https, or set insecure", c.Endpoint)
		case u.Scheme != "https" && u.Scheme != "http":
			fail("endpoint", "%q is not https://HOST[:PORT][/PATH]", c.Endpoint)
		}
	}
	if c.Repository != "" {
		if ref, err := ociregistry.ParseReference(c.Repository); err != nil || ref.Reference != "" {
			fail("repository", "%q is not HOST[:PORT]/PATH without a scheme, tag or digest", c.Repository)
		}
	}
	if _, err := web.Client(c.CA); err != nil {
		fail("ca", "%w", err)
	}
	if err := c.validateCredentials(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c *Config) validateCredentials() error {
	var missing []string
	switch c.Kind {
	case S3:
		for _, key := range []string{KeyAccessKeyID, KeySecretAccessKey} {
			if len(c.Credentials[key]) == 0 {
				missing = append(missing, key)
			}
		}
	case GCS:
		if len(c.Credentials[KeyServiceAccount]) == 0 {
			missing = append(missing, KeyServiceAccount)
		}
	case Azure:
		if (len(c.Credentials[KeyAccountKey]) == 0) == (len(c.Credentials[KeySASToken]) == 0) {
			return wrong("credentials", "one of %s and %s is required", KeyAccountKey, KeySASToken)
		}
		if key := c.Credentials[KeyAccountKey]; len(key) > 0 {
			if _, err := base64.StdEncoding.DecodeString(text(key)); err != nil {
				return wrong("credentials", "%s is not base64", KeyAccountKey)
			}
		}
	case Registry:
		if _, _, err := c.login(); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		return wrong("credentials", "the Secret has no %s", strings.Join(missing, " and no "))
	}
	return nil
}

// Open opens a backend without connecting to anything.
func Open(ctx context.Context, c Config) (backend.Backend, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%w: the store's configuration: %w", backend.ErrInvalid, err)
	}
	if c.Kind == Directory {
		return dir.Open(c.Path)
	}
	client, err := web.Client(c.CA)
	if err != nil {
		return nil, wrong("ca", "%w", err)
	}
	prefix := c.Prefix
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	secret := func(key string) string { return text(c.Credentials[key]) }
	switch c.Kind {
	case S3:
		return bucket.S3{Bucket: c.Bucket, Prefix: prefix, Region: c.Region, Endpoint: c.Endpoint, PathStyle: c.PathStyle,
			AccessKeyID: secret(KeyAccessKeyID), SecretAccessKey: secret(KeySecretAccessKey), SessionToken: secret(KeySessionToken), HTTP: client}.Open(ctx)
	case GCS:
		b, err := bucket.GCS{Bucket: c.Bucket, Prefix: prefix, Endpoint: c.Endpoint, Key: c.Credentials[KeyServiceAccount], HTTP: client}.Open(ctx)
		if err != nil {
			return nil, wrong("credentials", "%w", err)
		}
		return b, nil
	case Azure:
		return bucket.Azure{Container: c.Bucket, Prefix: prefix, Endpoint: c.Endpoint, Account: c.Account,
			AccountKey: secret(KeyAccountKey), SASToken: secret(KeySASToken), HTTP: client}.Open(ctx)
	default:
		username, password, err := c.login()
		if err != nil {
			return nil, err
		}
		return registry.Open(registry.Options{Repository: c.Repository, PlainHTTP: c.Insecure, Username: username, Password: password, HTTP: client})
	}
}

// login finds the user of a registry in either kind of Secret; nobody if there is none.
func (c *Config) login() (username, password string, err error) {
	config := c.Credentials[KeyDockerConfig]
	if len(config) == 0 {
		username, password = text(c.Credentials[KeyUsername]), text(c.Credentials[KeyPassword])
		if (username == "") != (password == "") {
			return "", "", wrong("credentials", "%s and %s belong together", KeyUsername, KeyPassword)
		}
		if username == "" && len(c.Credentials) > 0 {
			return "", "", wrong("credentials", "the Secret has neither %s and %s nor %s", KeyUsername, KeyPassword, KeyDockerConfig)
		}
		return username, password, nil
	}
	var docker struct {
		Auths map[string]struct{ Username, Password, Auth string }
	}
	if err := json.Unmarshal(config, &docker); err != nil {
		return "", "", wrong("credentials", "%s is not JSON as docker writes it", KeyDockerConfig) // the error would quote from it
	}
	host, _, _ := strings.Cut(c.Repository, "/")
	for name, login := range docker.Auths {
		if !sameHost(name, host) {
			continue
		}
		if login.Auth != "" {
			both, err := base64.StdEncoding.DecodeString(login.Auth)
			user, pass, found := strings.Cut(string(both), ":")
			if err != nil || !found {
				return "", "", wrong("credentials", "%s: the auth of %s is not base64 of USER:PASSWORD", KeyDockerConfig, name)
			}
			return user, pass, nil
		}
		return login.Username, login.Password, nil
	}
	return "", "", wrong("credentials", "%s has no login for %s", KeyDockerConfig, host)
}

// sameHost takes the forms in which docker writes a registry: HOST, https://HOST/v1/.
func sameHost(entry, host string) bool {
	entry = strings.TrimPrefix(strings.TrimPrefix(entry, "https://"), "http://")
	entry, _, _ = strings.Cut(entry, "/")
	if h, port, err := net.SplitHostPort(entry); err == nil && port == "443" {
		entry = h
	}
	if entry == "index.docker.io" {
		entry = "docker.io"
	}
	return entry == host
}

// text is what a key of a Secret holds, without the line's end that editors add.
func text(value []byte) string { return strings.TrimRight(string(value), "\r\n") }
