//go:build !amd64

package cow

import "errors"

const supported = false

const (
	stubSize = 160
	harmless = 0
)

var errArchitecture = errors.New("this processor's registers are not known")

type registers struct{}

func getRegisters(int) (registers, error)                      { return registers{}, errArchitecture }
func setRegisters(int, registers) error                        { return errArchitecture }
func (r registers) stack() uint64                              { return 0 }
func (r registers) instruction() uint64                        { return 0 }
func (r registers) result() int64                              { return 0 }
func (r registers) inSyscall() bool                            { return false }
func (r registers) atEntry(uint64) bool                        { return false }
func (r registers) calling(uint64, [5]uint64) registers        { return r }
func (r registers) instead(uint64) registers                   { return r }
func (r registers) at(uint64) registers                        { return r }
func stub(registers, bool) []byte                              { return nil }
func fixCriticalSection(_ int, r registers) (registers, error) { return r, nil }
