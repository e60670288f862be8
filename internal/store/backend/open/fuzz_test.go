package open

import (
	"strings"
	"testing"
)

// FuzzLogin reads what a Secret of the type kubernetes.io/dockerconfigjson may hold. No
// error may quote from it.
func FuzzLogin(f *testing.F) {
	f.Add([]byte(`{"auths":{"registry.example":{"username":"a","password":"b"}}}`), "registry.example/team/checkpoints")
	f.Add([]byte(`{"auths":{"https://registry.example:443/v1/":{"auth":"YTpi"}}}`), "registry.example/x")
	f.Add([]byte(`{"auths":{"index.docker.io":{"auth":"c2VjcmV0c2VjcmV0"}}}`), "docker.io/x")
	f.Fuzz(func(t *testing.T, config []byte, repository string) {
		c := Config{Kind: Registry, Repository: repository, Credentials: map[string][]byte{KeyDockerConfig: config}}
		username, password, err := c.login()
		if err != nil && (username != "" || password != "") {
			t.Error("there is a login, and an error")
		}
		if err != nil && strings.Contains(string(config), "c2VjcmV0c2VjcmV0") && strings.Contains(err.Error(), "c2VjcmV0c2VjcmV0") &&
			!strings.Contains(repository, "c2VjcmV0c2VjcmV0") && !strings.Contains(string(config), `"c2VjcmV0c2VjcmV0":`) {
			t.Errorf("the error quotes the Secret: %v", err)
		}
	})
}
