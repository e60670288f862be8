package cri_test

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestARestoredPodContinuesWhereItsSourceWasCaptured(t *testing.T) {
	n := theNode
	a, b := container("a", counting), container("b", `i=1000; while :; do i=$((i+1)); echo $i; usleep 10000; done`)
	source := n.run(t, "", a, b)
	source.numbers(t, "a", 20)
	source.numbers(t, "b", 20)

	dir, m := source.checkpoint(t)
	t.Logf("frozen for %v, phases %v, %d bytes", m.FreezeDuration, m.Phases, m.LogicalBytes())

	restored := n.restore(t, dir, a, b)
	for name, first := range map[string]int{"a": 1, "b": 1001} {
		numbers := restored.numbers(t, name, 20)
		if numbers[0] < first+20 {
			t.Errorf("container %s began anew: %v", name, numbers[:3])
		}
		for i, v := range numbers {
			if v != numbers[0]+i {
				t.Fatalf("container %s went from %d to %d", name, numbers[i-1], v)
			}
		}
		eventually(t, fmt.Sprintf("container %s of the source prints %d too", name, numbers[0]), func() bool {
			return slices.Contains(source.numbers(t, name, 20), numbers[0])
		})
		source.goesOn(t, name)
	}
	if got := restored.exec(t, "a", "hostname"); got != restored.name {
		t.Errorf("the restored Pod calls itself %q, not %q", got, restored.name)
	}
}

func TestAPodOfTheRestoringHandlerCanBeCapturedLikeAnyOther(t *testing.T) {
	a := container("a", counting)
	source := theNode.run(t, handler, a)
	source.numbers(t, "a", 5)
	dir, _ := source.checkpoint(t)
	theNode.restore(t, dir, a).goesOn(t, "a")
}

func TestARestoredPodCanBeCapturedAndRestoredAgain(t *testing.T) {
	a := container("a", counting)
	dir := checkpointOf(t, a)
	for range 3 {
		p := theNode.restore(t, dir, a)
		p.goesOn(t, "a")
		dir, _ = p.checkpoint(t)
		p.goesOn(t, "a")
	}
}

func TestTheWritableLayerComesBack(t *testing.T) {
	script := `echo text > /root/new; chmod 640 /root/new; chown 12:34 /root/new; ln /root/new /root/hard
rm /etc/group; mkdir /root/dir; ln -s /root/new /root/sym; mkfifo /root/fifo; head -c 3000000 /dev/zero > /root/big
` + counting
	a := container("a", script)
	p := theNode.restore(t, checkpointOf(t, a), a)
	p.goesOn(t, "a")
	for command, want := range map[string]string{
		"cat /root/sym":                                     "text",
		"stat -c %a:%u:%g:%h /root/new":                     "640:12:34:2",
		"[ /root/new -ef /root/hard ] && echo same":         "same",
		"ls /etc/group 2>/dev/null || echo gone":            "gone",
		"[ -d /root/dir ] && [ -p /root/fifo ] && echo yes": "yes",
		"stat -c %s /root/big":                              "3000000",
	} {
		if got := p.exec(t, "a", command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
}

func TestOpenFilesPipesAndChildrenComeBack(t *testing.T) {
	// A pipeline of three processes over two pipes, with a file open for writing
	// at its offset and another one for reading at its own.
	script := `exec 3>/root/out 4</etc/passwd; read -r x <&4
{ i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done; } | while read -r n; do echo ${n}0; done | while read -r n; do echo "$n" >&3; echo "$n"; done`
	a := container("a", script)
	source := theNode.run(t, "", a)
	source.numbers(t, "a", 20)
	dir, _ := source.checkpoint(t)
	p := theNode.restore(t, dir, a)
	numbers := p.numbers(t, "a", 20)
	for i, v := range numbers {
		if v != numbers[0]+10*i || v < 200 {
			t.Fatalf("the pipeline lost or repeated something: %v", numbers)
		}
	}
	if got := p.exec(t, "a", `i=0; while read -r n; do i=$((i+10)); [ $n = $i ] || { echo $n after $i; break; }; done < /root/out; echo ok`); got != "ok" {
		t.Errorf("the open file: %s", got)
	}
}

func TestContainersThatShareAPIDNamespaceComeBack(t *testing.T) {
	// With so many processes hardly an ID is free that something of the restore could take
	// without being in the way.
	many := `n=0; while [ $n -lt 60 ]; do n=$((n+1)); sleep 100000 & done; ` + counting
	a, b := container("a", many), container("b", many)
	for _, c := range []*runtimeapi.ContainerConfig{a, b} {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	}
	const processes = `cd /proc; for p in [0-9]*; do [ "$(tr '\0' ' ' < $p/cmdline)" != "sleep 100000 " ] || echo $p; done | sort -n`
	source := theNode.run(t, "", a, b)
	source.numbers(t, "a", 5)
	source.numbers(t, "b", 5)
	want := source.exec(t, "a", processes)
	dir, _ := source.checkpoint(t)
	p := theNode.restore(t, dir, a, b)
	p.goesOn(t, "a")
	p.goesOn(t, "b")
	if got := p.exec(t, "b", processes); got != want || len(strings.Fields(got)) != 120 {
		t.Errorf("the processes were %s, and are %s", want, got)
	}
	highest, err := strconv.Atoi(want[strings.LastIndexByte(want, '\n')+1:])
	must(t, err)
	if next, err := strconv.Atoi(p.exec(t, "a", "echo $$")); err != nil || next <= highest {
		t.Errorf("a process that started after the restore got ID %d, and %d was the checkpoint's: %v", next, highest, err)
	}
}

// established counts the ends of TCP connections of a network namespace.
const established = `cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 01 0' || true`

// awaitListener is a script that waits until somebody listens on a TCP port.
func awaitListener(port int) string {
	return fmt.Sprintf(`until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':%04X .* 0A '; do usleep 10000; done;`, port)
}

func TestAContainerWithTCPConnectionsIsCapturedAndItsListenerComesBack(t *testing.T) {
	a := container("a", `nc -ll -p 7000 -e cat & `+awaitListener(7000)+` { while :; do echo ping; sleep 1; done; } | nc 127.0.0.1 7000 > /tmp/answers & `+counting)
	source := theNode.run(t, "", a)
	// One that is there may not have been accepted yet.
	eventually(t, "the connection is there, and answered", func() bool {
		return source.exec(t, "a", established) >= "2" && source.exec(t, "a", "[ ! -s /tmp/answers ] || echo yes") == "yes"
	})
	dir, _ := source.checkpoint(t)
	source.goesOn(t, "a")
	if got := source.exec(t, "a", established); got < "2" {
		t.Errorf("the source has %s ends of connections left", got)
	}
	if got := source.packetFilter(t, "a"); got != "" {
		t.Errorf("the capture left packet filter rules in the source's network:\n%s", got)
	}
	p := theNode.restore(t, dir, a)
	p.goesOn(t, "a")
	if got := p.exec(t, "a", established); got < "2" {
		t.Errorf("the restored container has %s ends of its connection to itself", got)
	}
	if got := p.exec(t, "a", "echo hello | timeout 5 nc 127.0.0.1 7000"); got != "hello" {
		t.Errorf("the restored listener answered %q", got)
	}
}

// packetFilter lists the packet filter rules of a container's network.
func (p *pod) packetFilter(t *testing.T, container string) string {
	t.Helper()
	status, err := p.node.runtime.ContainerStatus(testContext(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers[container], Verbose: true})
	must(t, err)
	var info struct{ PID int }
	must(t, json.Unmarshal([]byte(status.Info["info"]), &info))
	out, err := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", info.PID), "nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("nft list ruleset: %v: %s", err, out)
	}
	return string(out)
}

func TestARestoredContainerEndsWithItsExitCodeAndByItsSignal(t *testing.T) {
	a := container("a", `trap 'exit 42' TERM; `+counting)
	p := theNode.restore(t, checkpointOf(t, a), a)
	p.goesOn(t, "a")
	_, err := theNode.runtime.StopContainer(testContext(t), &runtimeapi.StopContainerRequest{ContainerId: p.containers["a"], Timeout: 10})
	must(t, err)
	answer, err := theNode.runtime.ContainerStatus(testContext(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers["a"]})
	must(t, err)
	if answer.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED || answer.Status.ExitCode != 42 {
		t.Errorf("it is %v with exit code %d", answer.Status.State, answer.Status.ExitCode)
	}
}

func TestAContainerStartedAgainAfterItsRestoreIsAnOrdinaryStart(t *testing.T) {
	a := container("a", counting)
	p := theNode.restore(t, checkpointOf(t, a), a)
	p.goesOn(t, "a")
	_, err := theNode.runtime.StopContainer(testContext(t), &runtimeapi.StopContainerRequest{ContainerId: p.containers["a"]})
	must(t, err)
	// As the kubelet does it: with the sandbox's annotations, which ask for a restore.
	status, err := theNode.runtime.PodSandboxStatus(testContext(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	must(t, err)
	p.config.Annotations = status.Status.Annotations
	again := container("a", counting)
	again.Metadata.Attempt = 1
	again.LogPath = "a-1.log"
	created, err := theNode.runtime.CreateContainer(testContext(t), &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: again, SandboxConfig: p.config})
	must(t, err)
	_, err = theNode.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
	must(t, err)
	if first := p.numbers(t, "a-1", 3)[0]; first != 1 {
		t.Errorf("it went on at %d", first)
	}
}

func TestARestoredContainerThatWasNeverStartedCanBeRemoved(t *testing.T) {
	a := container("a", counting)
	p := theNode.prepareRestore(t, checkpointOf(t, a), a)
	_, err := theNode.runtime.RemoveContainer(testContext(t), &runtimeapi.RemoveContainerRequest{ContainerId: p.containers["a"]})
	must(t, err)
}

func TestANonRootContainerWithDroppedCapabilitiesAndSeccompComesBackAsItWas(t *testing.T) {
	a := container("a", counting)
	a.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1234}
	a.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 4321}
	a.Linux.SecurityContext.NoNewPrivs = true
	a.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	a.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	status := `grep -E '^(Uid|Gid|Cap...|NoNewPrivs|Seccomp):' /proc/1/status | tr -s '\t\n' ' '`
	source := theNode.run(t, "", a)
	source.numbers(t, "a", 5)
	want := source.exec(t, "a", status)
	dir, _ := source.checkpoint(t)
	p := theNode.restore(t, dir, a)
	p.goesOn(t, "a")
	if got := p.exec(t, "a", status); got != want {
		t.Errorf("it has %q, the source %q", got, want)
	}
}

func TestAStoppedProcessIsRefusedBeforeTheFreezeAndNamed(t *testing.T) {
	p := theNode.run(t, "", container("a", `sleep 1000 & until grep -qx sleep /proc/$!/comm; do usleep 10000; done
kill -STOP $!; until grep -q '^State:.T' /proc/$!/status; do usleep 10000; done; `+counting))
	p.numbers(t, "a", 5)
	p.refused(t, p.checkpointRequest(t), 9 /* FailedPrecondition */, "sleep")
	p.goesOn(t, "a")
}
