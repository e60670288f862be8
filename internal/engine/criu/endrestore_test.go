package criu

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestProcessesOfARestoreAreEndedWhereSomethingOfOneIsLeft(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"nothing", "another/frozen", "restore/" + RestorePrefix + "1"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		runDir, id string
		ends       bool
	}{
		{"nothing", "container-end", false},
		{"another", "container-end", false},
		{"absent", "container-end", false},
		{"restore", "container-other", false},
		{"restore", "container-end", true},
		{"restore", "sandbox-end", true},
		{"file", "container-end", true}, // who cannot look may not take it for nothing
	} {
		cmd := exec.Command("sleep", "60")
		cmd.Env = append(os.Environ(), restoreEnv+"=sandbox-end.container-end")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		err := EndRestores(filepath.Join(dir, c.runDir), c.id)
		if err != nil {
			t.Errorf("%s in %s: %v", c.id, c.runDir, err)
		}
		select {
		case <-ended:
			if !c.ends {
				t.Errorf("%s in %s: it was ended", c.id, c.runDir)
			}
		case <-time.After(200 * time.Millisecond):
			if c.ends {
				t.Errorf("%s in %s: it lives on", c.id, c.runDir)
			}
			cmd.Process.Kill()
			<-ended
		}
	}
}
