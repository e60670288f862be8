package freeze

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"
)

const (
	// quietShare is how much of the processors' time nobody wants on a machine that is quiet.
	quietShare = 0.85
	quietFor   = 3 * time.Second
	// quietPatience bounds the wait: on a machine that has other work it would not end.
	quietPatience = 2 * time.Minute
)

// quiet waits until a cluster that has just been started has come to rest. What is measured
// first would be measured beside that.
func quiet(ctx context.Context) error {
	for end := time.Now().Add(quietPatience); time.Now().Before(end); {
		idle, all, err := processorTime()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(quietFor):
		}
		laterIdle, laterAll, err := processorTime()
		if err != nil {
			return err
		}
		if float64(laterIdle-idle) >= quietShare*float64(laterAll-all) {
			return nil
		}
	}
	return nil // what is measured shows it
}

// processorTime is how long all processors have been idle, and all in all, in ticks since
// the machine's start (/proc/stat, proc_stat(5)).
func processorTime() (idle, all uint64, err error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	for i, field := range bytes.Fields(line)[1:] {
		n, err := strconv.ParseUint(string(field), 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/stat: %w", err)
		}
		if i == 3 || i == 4 { // idle, iowait
			idle += n
		}
		if i < 8 { // guests' time is in that of users
			all += n
		}
	}
	return idle, all, nil
}
