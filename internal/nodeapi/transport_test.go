package nodeapi_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
)

type handlerFunc func(nodeapi.Request) nodeapi.Response

func (f handlerFunc) Handle(_ context.Context, r nodeapi.Request) nodeapi.Response { return f(r) }

func serve(t *testing.T, h nodeapi.Handler) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nodeapi.Serve(ctx, l, h, slog.New(slog.DiscardHandler)) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return socket, stop
}

func TestAQuestionIsAnsweredWithItsAnswer(t *testing.T) {
	socket, stop := serve(t, handlerFunc(func(r nodeapi.Request) nodeapi.Response {
		return nodeapi.Response{Action: nodeapi.ActionRestore, Container: &nodeapi.ContainerRestore{ImageDir: "/" + r.CreateContainer.Container}}
	}))
	defer stop()
	got, err := nodeapi.Call(context.Background(), socket, nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{Container: "web"}})
	if err != nil || got.Action != nodeapi.ActionRestore || got.Container.ImageDir != "/web" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestAStoppingAgentFinishesTheAnswerThatIsUnderWay(t *testing.T) {
	asked, let := make(chan bool), make(chan bool)
	socket, stop := serve(t, handlerFunc(func(nodeapi.Request) nodeapi.Response {
		asked <- true
		<-let
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}
	}))
	result := make(chan error, 1)
	go func() {
		_, err := nodeapi.Call(context.Background(), socket, nodeapi.Request{})
		result <- err
	}()
	<-asked
	go func() { time.Sleep(20 * time.Millisecond); close(let) }()
	stop()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestASandboxWhoseCreatorIsGoneBeforeTheAnswerIsForgotten(t *testing.T) {
	asked, let, reports := make(chan bool), make(chan bool), make(chan nodeapi.Report, 1)
	socket, stop := serve(t, handlerFunc(func(r nodeapi.Request) nodeapi.Response {
		if r.Report != nil {
			reports <- *r.Report
			return nodeapi.Response{}
		}
		asked <- true
		<-let
		return nodeapi.Response{Action: nodeapi.ActionRestore}
	}))
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	request := nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: nodeapi.Sandbox{ID: "s1"}}}
	if err := json.NewEncoder(conn).Encode(request); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	close(let)
	select {
	case report := <-reports:
		if report.Stage != nodeapi.StageDeleted || report.Sandbox.ID != "s1" {
			t.Errorf("reported %+v", report)
		}
	case <-ctx.Done():
		t.Error("the sandbox that nobody makes is not forgotten")
	}
}

func TestAnAgentThatIsNotThereIsSaidToBeSo(t *testing.T) {
	_, err := nodeapi.Call(context.Background(), filepath.Join(t.TempDir(), "nosuch"), nodeapi.Request{})
	if err == nil || !strings.Contains(err.Error(), "is its Pod running?") {
		t.Errorf("got %v", err)
	}
}

func TestAnAgentThatGoesAwayBeforeItAnswersIsAnError(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
	}()
	if _, err := nodeapi.Call(context.Background(), socket, nodeapi.Request{}); err == nil {
		t.Error("no error")
	}
}
