package archive

import "testing"

func TestACheckpointHasTheFilesOfItsEngineAndNoOthers(t *testing.T) {
	containers := map[string]bool{"a": true}
	for path, has := range map[string]bool{
		"containers/a/criu/pages-1.img": true, "containers/b/criu/pages-1.img": false, "containers/a/other": false,
		"sandbox/checkpoint.img": true, "sandbox/.hidden": false, "sandbox/more/x.img": false, "sandboxes/x.img": false,
		"volumes/v.tar": true, "volumes/v": false,
	} {
		if err := checkPath(path, containers); (err == nil) != has {
			t.Errorf("%s: %v", path, err)
		}
	}
}
