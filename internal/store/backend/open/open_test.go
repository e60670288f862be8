package open

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/store/backend"
)

func secret(keyValues ...string) map[string][]byte {
	data := map[string][]byte{}
	for i := 0; i < len(keyValues); i += 2 {
		data[keyValues[i]] = []byte(keyValues[i+1])
	}
	return data
}

var (
	s3    = Config{Kind: S3, Bucket: "b", Region: "eu-west-1", Credentials: secret(KeyAccessKeyID, "a", KeySecretAccessKey, "hidden")}
	azure = Config{Kind: Azure, Bucket: "b", Account: "account", Credentials: secret(KeyAccountKey, base64.StdEncoding.EncodeToString([]byte("hidden")))}
	gcs   = Config{Kind: GCS, Bucket: "b", Credentials: secret(KeyServiceAccount, `{"type":"service_account","client_email":"a@b","private_key":"hidden"}`)}
	oci   = Config{Kind: Registry, Repository: "registry.example:5000/team/checkpoints", Credentials: secret(KeyUsername, "u", KeyPassword, "hidden")}
)

func TestAConfigurationThatIsRightOpensWithoutConnecting(t *testing.T) {
	docker := func(host, login string) map[string][]byte {
		return secret(KeyDockerConfig, fmt.Sprintf(`{"auths":{"elsewhere.example":{},%q:%s}}`, host, login))
	}
	for name, c := range map[string]Config{
		"directory": {Kind: Directory, Path: filepath.Join(t.TempDir(), "store")},
		"S3":        s3,
		"S3, another's": with(s3, func(c *Config) {
			c.Endpoint, c.PathStyle, c.Prefix = "https://s3.example:9000/path", true, "stores/a=b"
		}),
		"S3, unencrypted":     with(s3, func(c *Config) { c.Endpoint, c.Insecure = "http://127.0.0.1:9000", true }),
		"S3, with a token":    with(s3, func(c *Config) { c.Credentials[KeySessionToken] = []byte("t") }),
		"GCS":                 gcs,
		"Azure":               azure,
		"Azure, SAS":          with(azure, func(c *Config) { c.Credentials = secret(KeySASToken, "?sv=1&sig=2") }),
		"registry":            oci,
		"oci, nobody":         with(oci, func(c *Config) { c.Credentials = nil }),
		"oci, docker's":       with(oci, func(c *Config) { c.Credentials = docker("https://registry.example:5000/v1/", `{"auth":"dTpw"}`) }),
		"oci, docker's, text": with(oci, func(c *Config) { c.Credentials = docker("registry.example:5000", `{"username":"u","password":"p"}`) }),
	} {
		b, err := Open(t.Context(), c)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := b.Close(); err != nil {
			t.Errorf("%s: close: %v", name, err)
		}
	}
}

func TestWhatIsWrongIsNamedByItsField(t *testing.T) {
	for name, test := range map[string]struct {
		config Config
		fields string
	}{
		"nothing":                  {Config{}, "kind"},
		"no path":                  {Config{Kind: Directory}, "path"},
		"a path that is relative":  {Config{Kind: Directory, Path: "store"}, "path"},
		"a path that goes up":      {Config{Kind: Directory, Path: "/a/../b"}, "path"},
		"the root":                 {Config{Kind: Directory, Path: "/"}, "path"},
		"a directory with a login": {Config{Kind: Directory, Path: "/a", Credentials: secret("a", "b")}, "credentials"},
		"a directory in a bucket":  {Config{Kind: Directory, Path: "/a", Bucket: "b", Insecure: true}, "bucket insecure"},
		"S3, bare":                 {Config{Kind: S3}, "bucket region credentials"},
		"no secret key":            {with(s3, func(c *Config) { delete(c.Credentials, KeySecretAccessKey) }), "credentials"},
		"unencrypted":              {with(s3, func(c *Config) { c.Endpoint = "http://s3.example" }), "endpoint"},
		"an endpoint that is none": {with(s3, func(c *Config) { c.Endpoint = "s3.example" }), "endpoint"},
		"a login in the endpoint":  {with(s3, func(c *Config) { c.Endpoint = "https://a:b@s3.example" }), "endpoint"},
		"a bucket with a path":     {with(s3, func(c *Config) { c.Bucket = "a/b" }), "bucket"},
		"a prefix that goes up":    {with(s3, func(c *Config) { c.Prefix = "a/../b" }), "prefix"},
		"a prefix from the root":   {with(s3, func(c *Config) { c.Prefix = "/a" }), "prefix"},
		"a CA that is none":        {with(s3, func(c *Config) { c.CA = []byte("hello") }), "ca"},
		"GCS, no key":              {with(gcs, func(c *Config) { c.Credentials = nil }), "credentials"},
		"Azure, no key":            {with(azure, func(c *Config) { c.Credentials = nil }), "credentials"},
		"Azure, both":              {with(azure, func(c *Config) { c.Credentials[KeySASToken] = []byte("s") }), "credentials"},
		"Azure, not base64":        {with(azure, func(c *Config) { c.Credentials = secret(KeyAccountKey, "hidden!") }), "credentials"},
		"Azure, an account's URL":  {with(azure, func(c *Config) { c.Account = "a.evil.example/" }), "account"},
		"a scheme":                 {with(oci, func(c *Config) { c.Repository = "https://registry.example/a" }), "repository"},
		"a tag":                    {with(oci, func(c *Config) { c.Repository = "registry.example/a:latest" }), "repository"},
		"a user, no password":      {with(oci, func(c *Config) { delete(c.Credentials, KeyPassword) }), "credentials"},
		"another kind of Secret":   {with(oci, func(c *Config) { c.Credentials = secret("token", "hidden") }), "credentials"},
		"docker's, of others": {with(oci, func(c *Config) {
			c.Credentials = secret(KeyDockerConfig, `{"auths":{"registry.example":{"auth":"dTpw"}}}`)
		}), "credentials"},
		"docker's, not JSON": {with(oci, func(c *Config) { c.Credentials = secret(KeyDockerConfig, `hidden`) }), "credentials"},
	} {
		_, err := Open(t.Context(), test.config)
		if !errors.Is(err, backend.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
			continue
		}
		if strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: a secret is in the error: %v", name, err)
		}
		if got := strings.Join(fields(err), " "); got != test.fields {
			t.Errorf("%s: wrong are %q, want %q: %v", name, got, test.fields, err)
		}
	}
}

func TestAnOpenedBackendOutlivesTheContextItWasOpenedWith(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	b, err := Open(ctx, Config{Kind: Directory, Path: filepath.Join(t.TempDir(), "store")})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	defer b.Close()
	if err := b.Put(t.Context(), "packs/a", nil, nil); err != nil {
		t.Error(err)
	}
}

// fields are the names of all FieldErrors in an error.
func fields(err error) []string {
	if field := (*FieldError)(nil); errors.As(err, &field) {
		if _, joined := err.(interface{ Unwrap() []error }); !joined {
			return []string{field.Field}
		}
	}
	var all []string
	if joined, is := err.(interface{ Unwrap() []error }); is {
		for _, err := range joined.Unwrap() {
			all = append(all, fields(err)...)
		}
	}
	return all
}

func with(c Config, change func(*Config)) Config {
	credentials := map[string][]byte{}
	for key, value := range c.Credentials {
		credentials[key] = value
	}
	c.Credentials = credentials
	change(&c)
	return c
}
